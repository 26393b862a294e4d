"""Train a CLIPModel or SiglipModel with the Hugging Face Trainer; the losses are the same for any number of processes.

python examples/recipes/hf_trainer.py
torchrun --nproc-per-node 2 examples/recipes/hf_trainer.py --model siglip
torchrun --nproc-per-node 2 examples/recipes/hf_trainer.py --micro-batch 4    # activations of 4 pairs at a time
"""

import argparse
import math
import os
import tempfile

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from pacl_kernels import PaclLoss, cached_step


class PaclClip(nn.Module):
    """Wrap a CLIPModel or SiglipModel, and compute PACL's loss in place of the model's own."""

    def __init__(self, clip: CLIPModel | SiglipModel):
        super().__init__()
        self.clip = clip
        self.is_siglip = isinstance(clip, SiglipModel)
        if self.is_siglip:
            clip.vision_model.head.requires_grad_(False)  # pools, so it gets no gradient, which DDP would wait for
        loss = "sigmoid" if self.is_siglip else "infonce"
        self.loss = PaclLoss(attn_temperature=0.05, form="cosine", loss=loss, group="world")

    def embed(self, pixel_values: Tensor, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Return patches [B, N, D], row by row; texts [B, D]; the logit scale, and SigLIP's bias."""
        hidden = self.clip.vision_model(pixel_values).last_hidden_state
        texts = self.clip.text_model(input_ids).pooler_output
        if self.is_siglip:
            return hidden, texts, self.clip.logit_scale.exp(), self.clip.logit_bias
        patches = self.clip.vision_model.post_layernorm(hidden[:, 1:])  # without the class token
        return self.clip.visual_projection(patches), self.clip.text_projection(texts), self.clip.logit_scale.exp()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, return_loss: bool = True):
        """Return {"loss": loss}, as Trainer expects, or the arguments of the loss."""
        embedded = self.embed(pixel_values, input_ids)
        return {"loss": self.loss(*embedded)} if return_loss else embedded


class ClampScale(TrainerCallback):
    """Keep the logit scale below `largest` after every step, as CLIP does."""

    def __init__(self, model: PaclClip, largest: float):
        self.scale, self.largest = model.clip.logit_scale, math.log(largest)

    def on_step_end(self, *_, **__) -> None:
        with torch.no_grad():
            self.scale.clamp_(max=self.largest)


class CachedTrainer(Trainer):
    """Contrast all pairs of the batch with the activations of only `micro_batch` pairs in memory."""

    micro_batch = 4

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        model.train()
        modules = [model] if self.args.world_size > 1 else []
        with self.accelerator.autocast():
            return cached_step(
                lambda part: model(**part, return_loss=False),
                inputs,
                self.model.loss,
                micro_batch=self.micro_batch,
                modules=modules,
            )


def random_model(name: str) -> CLIPModel | SiglipModel:
    """Return a tiny model with random weights, in place of `CLIPModel.from_pretrained(...)`."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 67, "max_position_embeddings": 3, "bos_token_id": 64, "eos_token_id": 65}
    text |= {"pad_token_id": 66}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    if name == "siglip":
        model = SiglipModel(SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=vision))
        nn.init.constant_(model.logit_scale, math.log(10.0))
        nn.init.constant_(model.logit_bias, -10.0)
        return model
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))


def pairs(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Return images [3, 32, 32], noise with a square in one of 64 colours, and captions [3] of token ids."""
    colours = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(64, (count,), generator=generator)
    images = 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
    for image, word, cell in zip(images, words, torch.randint(16, (count,), generator=generator), strict=True):
        row, column = 8 * (int(cell) // 4), 8 * (int(cell) % 4)
        image[:, row : row + 8, column : column + 8] += colours[word, :, None, None]
    captions = [torch.tensor([64, int(word), 65]) for word in words]
    return [{"pixel_values": x, "input_ids": y} for x, y in zip(images, captions, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["clip", "siglip"], default="clip")
    parser.add_argument("--batch-size", type=int, default=16, help="Pairs in a batch of all processes together.")
    parser.add_argument("--micro-batch", type=int, help="Pairs that a process encodes at a time.")
    parser.add_argument("--max-scale", type=float, default=100.0, help="Largest logit scale.")
    parser.add_argument("--bf16", action="store_true", help="Train under autocast to bfloat16.")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world:
        parser.error(f"--batch-size: got {args.batch_size}, expected a multiple of the {world} processes")

    set_seed(0)
    model = PaclClip(random_model(args.model))
    settings = TrainingArguments(
        output_dir=tempfile.gettempdir(), use_cpu=not torch.cuda.is_available(), seed=0,
        learning_rate=1e-3, adam_epsilon=1e-3,  # large, because some biases of softmax have gradients of rounding alone
        lr_scheduler_type="constant", per_device_train_batch_size=args.batch_size // world, num_train_epochs=1,
        dataloader_drop_last=True, ddp_find_unused_parameters=False, bf16=args.bf16,
        label_names=[], prediction_loss_only=True, eval_strategy="epoch",
        per_device_eval_batch_size=args.batch_size // world,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    kind = CachedTrainer if args.micro_batch else Trainer
    data, unseen = pairs(args.batch_size * args.steps, seed=1), pairs(2 * args.batch_size, seed=2)
    trainer = kind(model, settings, train_dataset=data, eval_dataset=unseen)
    trainer.micro_batch = args.micro_batch
    trainer.add_callback(ClampScale(model, args.max_scale))
    trainer.train()
    if trainer.is_world_process_zero():
        for entry in trainer.state.log_history:
            if "loss" in entry:
                print(f"step {entry['step']}: loss {entry['loss']:.6f}", flush=True)
            elif "eval_loss" in entry:
                print(f"validation: loss {entry['eval_loss']:.6f}", flush=True)


if __name__ == "__main__":
    main()
