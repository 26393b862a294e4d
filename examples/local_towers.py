r"""Train on towers from local files, without a network: the folder of a CLIP, and a checkpoint of a timm model.

python examples/local_towers.py demo/clip vit_small_patch16_224.dino dino.safetensors \
    --out local --train-data demo/scenes/train-000.tar --batch-size 64 --max-steps 100

The folder of the CLIP holds open_clip_config.json and open_clip_model.safetensors, as on the Hub. Its text tower stays;
the timm model replaces its vision tower. All other flags go to `pacl train`. Needs timm 1.0.16 or newer.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports, which read it: a download is now an error

import timm
from pacl import load_pacl
from timm.models import save_for_hf

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("clip", type=Path, help="Folder of an open_clip model.")
parser.add_argument("timm_model", help="Name of the checkpoint's model; its tag decides how images are normalised.")
parser.add_argument("checkpoint", type=Path, help="Weights of the timm model, as safetensors.")
parser.add_argument("--out", type=Path, default=Path("local"), help="Folder to write to.")
args, flags = parser.parse_known_args()
if not (args.clip / "open_clip_config.json").is_file():
    parser.error(f"clip: got {args.clip}, expected a folder with open_clip_config.json")
if not timm.is_model(args.timm_model.split(".")[0]):
    parser.error(f"timm_model: got {args.timm_model}, expected a model of timm such as vit_small_patch16_224.dino")
if not args.checkpoint.is_file():
    parser.error(f"checkpoint: got {args.checkpoint}, which is not a file")

# timm's own format of a folder: config.json beside the weights. It is then named by local-dir:FOLDER, as a CLIP is.
vision = timm.create_model(args.timm_model, checkpoint_path=args.checkpoint)
save_for_hf(vision, args.out / "vision", safe_serialization=True)

towers = ["--model", f"local-dir:{args.clip}", "--vision-model", f"local-dir:{args.out / 'vision'}"]
command = [sys.executable, "-m", "pacl", "train", *towers, "--log-dir", str(args.out), *flags]
print(shlex.join(command), flush=True)
if subprocess.run(command).returncode:
    sys.exit("local_towers.py: the training failed, see above")

towers, embedder = load_pacl(args.out / "pacl" / "embedder")  # finds both towers and checks what they compute
print(f"vision tower: {embedder.towers['vision_model']}, tokens of {embedder.config['in_dim']} numbers")
print(f"text tower: {embedder.towers['model']}, embeddings of {embedder.config['out_dim']} numbers")
