"""What is the classifier of a network, and so what are its features."""

import pytest
import torch
from torch import nn

from casn_plugin.heads import ByClassifier, find_classifier, otherwise_than_torchreid

IMGS = torch.rand(2, 3, 8, 8)


def network(*end: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *end).eval()


@pytest.mark.parametrize(
    ("end", "names"),
    [
        ([nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5)], ("5",)),
        ([nn.Dropout(), nn.Linear(6, 5)], ("4",)),
        ([nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Identity()], ()),
    ],
)
def test_the_last_linear_layer_is_the_classifier(end, names):
    net = network(*end)
    found = find_classifier(net, IMGS)
    assert found == ByClassifier(names)
    logits, features = found(net, IMGS)
    if names:
        torch.testing.assert_close(logits, net(IMGS))
        torch.testing.assert_close(net[-1](features), logits)
    else:
        assert logits is None
        torch.testing.assert_close(features, net(IMGS))


@pytest.mark.parametrize(
    "end", [[nn.Linear(6, 5), nn.Softmax(1)], [nn.Linear(6, 5), nn.BatchNorm1d(5)], []]
)
def test_a_network_that_ends_otherwise_has_none(end):
    assert find_classifier(network(*end), IMGS) is None


def test_the_classifier_among_several_results():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.other = network(nn.Linear(6, 5)), nn.Linear(6, 2)

        def forward(self, imgs):
            vector = self.net[:3](imgs)
            return {"logits": self.net[3](vector), "more": self.other(vector).relu()}

    net = Several().eval()
    found = find_classifier(net, IMGS)
    assert found == ByClassifier(("net.3",))
    torch.testing.assert_close(found(net, IMGS)[0], net(IMGS)["logits"])


def test_the_heads_of_a_distilled_vit_are_averaged_as_it_does():
    timm = pytest.importorskip("timm")
    net = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=1, num_classes=5
    ).eval()
    imgs = torch.rand(2, 3, 32, 32)
    logits, features = find_classifier(net, imgs)(net, imgs)
    torch.testing.assert_close(logits, net(imgs))
    expected = net.forward_head(net.forward_features(imgs), pre_logits=True)
    torch.testing.assert_close(features, expected)
    net.set_distilled_training(True)
    torch.testing.assert_close(find_classifier(net, imgs)(net, imgs)[0], logits)


def test_a_classifier_that_is_not_called_is_an_error():
    net = network(nn.Linear(6, 5))
    net.spare = nn.Linear(6, 5)
    net.forward = lambda imgs: net[3](net[:3](imgs))
    with pytest.raises(ValueError, match="the classifier spare was not called"):
        ByClassifier(("spare",))(net, IMGS)


def test_a_classifier_of_any_kind_can_be_named():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.BatchNorm1d(6), nn.Linear(6, 5)

        def forward(self, vector):
            return self.inner(self.norm(vector))

    net = network(Normed()).eval()
    nn.init.uniform_(net[3].norm.weight)
    assert find_classifier(net, IMGS) == ByClassifier(("3.inner",))
    net.get_classifier = lambda: net[3]
    found = find_classifier(net, IMGS)
    assert found == ByClassifier(("3",))
    torch.testing.assert_close(found(net, IMGS)[1], net[:3](IMGS))


def test_a_network_is_run_once_to_find_its_classifier():
    net, runs = network(nn.Linear(6, 5)), []
    net.register_forward_hook(lambda *_: runs.append(1))
    assert find_classifier(net, IMGS) == ByClassifier(("3",)) and len(runs) == 1


def test_a_classifier_that_is_named_must_give_what_the_network_gives():
    net = network(nn.Linear(6, 5), nn.Softmax(1))
    net.get_classifier = lambda: net[3]
    assert find_classifier(net, IMGS) is None
    net.get_classifier = lambda: nn.ModuleList([net[3]])
    assert find_classifier(net, IMGS) is None
    net[4] = nn.Identity()
    assert find_classifier(net, IMGS) == ByClassifier(("3",))


def test_a_training_mode_that_is_tried_out_waits_for_no_other_process():
    class Norm(nn.SyncBatchNorm):
        def forward(self, vector):
            if self.training:
                raise RuntimeError("waits")
            return super().forward(vector)

    net = network(Norm(6), nn.Linear(6, 5))
    net.loss = "triplet"
    assert "it gave a Tensor of (2, 5)" in otherwise_than_torchreid(net, IMGS)
