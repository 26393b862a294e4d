"""The metrics equal numbers worked out by hand."""

import math

import pytest
import torch
from pacl.evaluate.metrics import IGNORE, ConfusionMatrix, class_scores, label_map, patch_labels, patch_shares


def test_confusion_matrix_by_hand():
    matrix = ConfusionMatrix(4)
    matrix.update(torch.tensor([[0, 0, 1], [1, IGNORE, 2]]), torch.tensor([[0, 1, 1], [1, 3, 0]]))
    # IoU by hand: class 0 has 1 hit, 2 true and 2 predicted pixels; class 1 has 2, 2, 3; class 2 hits 0 of 1; class 3
    # is only predicted for an ignored pixel.
    assert matrix.counts.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    iou = matrix.iou().tolist()
    assert iou[:3] == pytest.approx([1 / 3, 2 / 3, 0])
    assert math.isnan(iou[3])
    assert matrix.miou() == pytest.approx(1 / 3)
    assert matrix.miou([1, 3]) == pytest.approx(2 / 3)
    assert math.isnan(matrix.miou([3]))
    assert matrix.accuracy() == pytest.approx(3 / 5)
    assert matrix.accuracy([0]) == pytest.approx(1 / 2)


def test_confusion_matrix_streams():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (6, 10, 10), generator=generator, dtype=torch.uint8)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = IGNORE
    predicted = torch.randint(0, 5, (6, 10, 10), generator=generator)
    whole, parts = ConfusionMatrix(5), ConfusionMatrix(5)
    whole.update(truth, predicted)
    for i in range(0, 6, 2):
        parts.update(truth[i : i + 2], predicted[i : i + 2])
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts.sum() == (truth != IGNORE).sum()
    for label in range(5):  # the definition of IoU on sets of pixels
        a, b = (truth == label), (predicted == label) & (truth != IGNORE)
        assert whole.iou()[label] == pytest.approx(((a & b).sum() / (a | b).sum()).item())


@pytest.mark.parametrize("bad", [4, -1])
def test_confusion_matrix_refuses_unknown_labels(bad):
    with pytest.raises(ValueError, match="truth: got label"):
        ConfusionMatrix(4).update(torch.tensor([0, bad]), torch.tensor([0, 0]))


def test_patch_shares_and_labels():
    mask = torch.zeros(1, 4, 4, dtype=torch.uint8)
    mask[0, :2, 2:] = torch.tensor([[1, 1], [1, 2]])
    mask[0, 2:, :2] = IGNORE
    mask[0, 2:, 2:] = torch.tensor([[2, 1], [0, IGNORE]])
    shares = patch_shares(mask, 3, (2, 2))
    assert shares[0, :, 0, 1].tolist() == [0, 0.75, 0.25]
    assert shares[0, :, 1, 0].tolist() == [0, 0, 0]
    assert patch_labels(shares)[0].tolist() == [[0, 1], [IGNORE, IGNORE]]


def test_segmentation_finds_the_matching_text():
    texts = torch.eye(3)
    patches = torch.tensor([[[5.0, 0.1, 0], [0, 0.01, 0], [0, 0, 2.0], [1.0, 0, 0]]])  # of any norm
    scores = class_scores(patches, texts)
    assert scores.shape == (1, 3, 2, 2)
    assert scores.argmax(1).tolist() == [[[0, 1], [2, 0]]]
    labels = label_map(scores, (8, 8))
    assert labels.shape == (1, 8, 8)
    assert [labels[0, 0, 0], labels[0, 0, -1], labels[0, -1, 0], labels[0, -1, -1]] == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="patches: got 3 patches"):
        class_scores(patches[:, :3], texts)
