"""NaFlex ViTs: packed tokens of images of different sizes, training on them, and segmentation on each image's grid."""

import pytest
import timm
import torch
from pacl.backbones import NAFLEX_VITS, packed_tokens, patch_tokens, tower_blocks
from pacl.cli import main
from pacl.dense import dense_tokens, patch_size, token_step
from pacl.embedder import VisionEmbedder
from pacl.segment.predict import Segmenter
from pacl.towers import Towers, load_towers
from PIL import Image
from small_towers import naflex, save_naflex, train
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

from pacl_kernels import fused_pacl_loss

pytestmark = pytest.mark.skipif(not NAFLEX_VITS, reason="this timm has no NaFlex ViT")
torch.set_num_threads(1)
SIZES = [(32, 64), (16, 16), (80, 32), (64, 64)]
TOWERS = {
    "registers, norm of the pooled": {"name": "naflexvit_base_patch16_gap"},
    "ratio kept, factorised positions": {"name": "naflexvit_base_patch16_parfac_gap"},
    "attention pooler": {"name": "naflexvit_base_patch16_siglip"},
    "channels first": {"name": "naflexvit_base_patch16_gap", "patchify_channels_last": False},
}


def pictures(sizes=SIZES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


@pytest.mark.parametrize("options", TOWERS.values(), ids=TOWERS)
def test_packed_tokens_are_those_of_each_image_whatever_the_batch(options):
    visual, images = naflex(**options), pictures()
    tokens, lengths = packed_tokens(visual, images)
    assert lengths.tolist() == [8, 1, 10, 16] and tokens.shape == (35, 32)
    for found, image in zip(tokens.split(lengths.tolist()), images, strict=True):
        torch.testing.assert_close(found, patch_tokens(visual, image[None])[0], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(found, packed_tokens(visual, [image])[0], rtol=1e-4, atol=2e-5)
    backwards = packed_tokens(visual, images[::-1])
    assert backwards[1].tolist() == lengths.tolist()[::-1]
    expected = torch.cat(tokens.split(lengths.tolist())[::-1])
    torch.testing.assert_close(backwards[0], expected, rtol=1e-4, atol=2e-5)


def test_tokens_are_the_last_ones_after_the_norm():
    visual = naflex()
    kept = []
    visual.fc_norm.register_forward_hook(lambda module, inputs, output: kept.append(output))
    image = pictures()[:1]
    own = visual(image[0][None])  # timm's own pooling: the mean, then the norm
    tokens = visual.forward_features(image[0][None])[:, visual.num_prefix_tokens :]
    torch.testing.assert_close(own, visual.fc_norm(tokens.mean(1)))
    torch.testing.assert_close(packed_tokens(visual, image)[0], visual.fc_norm(tokens)[0], rtol=1e-4, atol=2e-5)


def test_training_packed_is_training_on_padding_with_a_mask():
    images, texts = pictures(), F.normalize(torch.randn(4, 24, generator=torch.Generator().manual_seed(2)), dim=1)
    grads, losses = [], []
    for packed in (True, False):
        visual = naflex().requires_grad_(True)
        torch.manual_seed(3)
        embedder = VisionEmbedder(32, 24)
        if packed:
            tokens, lengths = packed_tokens(visual, images)
            loss = fused_pacl_loss(embedder(tokens), texts, torch.tensor(5.0), patch_lengths=lengths.tolist())
        else:
            each = [embedder(patch_tokens(visual, image[None])[0]) for image in images]
            mask = nn.utils.rnn.pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in each], batch_first=True)
            padded = nn.utils.rnn.pad_sequence(each, batch_first=True)
            loss = fused_pacl_loss(padded, texts, torch.tensor(5.0), patch_mask=mask)
        loss.backward()
        losses.append(loss.detach())
        modules = {"visual": visual, "embedder": embedder}
        grads.append({f"{m}.{n}": x.grad for m, y in modules.items() for n, x in y.named_parameters()})
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert {n for n, x in grads[0].items() if x is None} == {n for n, x in grads[1].items() if x is None}
    assert grads[0]["visual.embeds.proj.weight"].abs().max() > 0
    for name, expected in grads[1].items():
        if expected is not None:
            scale = expected.abs().max().item() + 1e-4
            assert (grads[0][name] - expected).abs().max() <= 1e-3 * scale, name


def test_segmentation_keeps_the_grid_of_each_image():
    visual = naflex()
    assert patch_size(visual) == 16 and len(tower_blocks(visual)[0]) == 2
    image = pictures([(48, 80)])[0][None]
    assert torch.equal(dense_tokens(visual, image).flatten(1, 2), patch_tokens(visual, image))
    with pytest.raises(ValueError, match="stride: got 2, expected 1 for NaFlexVit"):
        token_step(visual, 2)
    pipeline = transforms.Compose(
        [transforms.Resize((64, 64)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )
    towers = Towers(visual, nn.Identity(), pipeline, list, {})
    segmenter = Segmenter(towers, VisionEmbedder(32, 24).eval())
    for size, grid in (((160, 80), (4, 8)), ((80, 160), (8, 4)), ((100, 100), (4, 4))):
        assert segmenter.dense(Image.new("RGB", size, "red")).patches.shape == (*grid, 24)


def test_commands_train_and_look(tower_world, tmp_path):
    folder = tmp_path / "naflex"
    save_naflex(folder)
    changes = {"vision-model": f"local-dir:{folder}", "force-image-size": 64, "max-steps": 2, "name": "run"}
    assert train(tower_world, tmp_path / "logs", **changes) == 0
    Image.new("RGB", (160, 80), "red").save(tmp_path / "wide.png")
    words = ["--words", "red ball,grass", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["look", str(tmp_path / "wide.png"), "--checkpoint", str(tmp_path / "logs/run"), *words]) == 0
    assert list((tmp_path / "out").glob("*wide*"))
    with pytest.raises(ValueError, match="force_image_size: got 50, expected a multiple of 16"):
        load_towers(f"local-dir:{tower_world / 'clip'}", vision_model=f"local-dir:{folder}", force_image_size=50)


def test_errors_name_the_argument():
    visual = naflex()
    with pytest.raises(TypeError, match="visual: got VisionTransformer, expected a NaFlex ViT"):
        packed_tokens(timm.create_model("test_vit", num_classes=0), pictures())
    with pytest.raises(ValueError, match="images: got none, expected at least one"):
        packed_tokens(visual, [])
    with pytest.raises(ValueError, match=r"images: got torch.float32 \[1, 3, 16, 16\] at 0, expected .* \[3, H, W\]"):
        packed_tokens(visual, [torch.zeros(1, 3, 16, 16)])
    for wrong in ((16, 40), (0, 16)):
        with pytest.raises(ValueError, match=r"images: got .* pixels, expected multiples of \[16, 16\]"):
            packed_tokens(visual, [torch.zeros(3, *wrong)])
    with pytest.raises(ValueError, match=r"images: got \[16, 40\] pixels, expected multiples of \[16, 16\]"):
        patch_tokens(visual, torch.zeros(1, 3, 16, 40))
