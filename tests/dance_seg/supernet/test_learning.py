"""The loss of a step's networks is that of each on its own, and every weight learns."""

import numpy as np
import torch

from dance_seg.early_exit.exits import Outputs
from dance_seg.losses import Loss, per_sample_loss, soft_label_loss
from dance_seg.models.multi_stage import MultiStageSupernet
from dance_seg.models.vit_resnas import VitResNas
from dance_seg.supernet.learning import losses_of_subnets
from dance_seg.supernet.sampling import Sampling

CLASSES = 5


def batch(count):
    return torch.randn(count, 3, 64, 64), torch.randint(0, CLASSES, (count, 64, 64))


def networks(model, count):
    random = np.random.default_rng(1)
    return (model.space.largest, model.space.smallest, *(model.space.sample(random) for _ in range(count - 2)))


def logits_of(output):
    return output.logits[-1] if isinstance(output, Outputs) else output


def test_networks_one_after_another_count_alike_and_smaller_ones_learn_the_largest_ones_soft_labels():
    model = MultiStageSupernet(CLASSES, "tiny").train()
    images, labels = batch(2)
    subnets = networks(model, 3)

    def losses_of(output):
        return per_sample_loss(logits_of(output), labels, Loss())

    options = Sampling(distillation=0.5, temperature=2.0)
    found, ran = losses_of_subnets(model, images, labels, subnets, options, losses_of)
    assert ran == subnets
    outputs = [model.extract(subnet)(images) for subnet in subnets]
    soft = logits_of(outputs[0])
    expected = torch.stack([losses_of(output) for output in outputs]).sum(0)
    for output in outputs[1:]:
        for logits in output.logits:  # every exit, the mean over three
            expected = expected + 0.5 / 3 * soft_label_loss(logits, soft, labels, 2.0)
    torch.testing.assert_close(found, expected / 3)
    plain, _ = losses_of_subnets(model, images, labels, subnets, Sampling(), losses_of)
    assert (plain < found).all()


def test_images_that_share_a_pass_have_the_loss_of_their_own_network():
    model = VitResNas(CLASSES, drop_path=0.0).train()
    images, labels = batch(6)
    subnets = networks(model, 4)  # of which three share six images evenly

    def losses_of(output):
        return per_sample_loss(output, labels, Loss())

    found, ran = losses_of_subnets(model, images, labels, subnets, Sampling(method="multi_architectural"), losses_of)
    assert ran == subnets[:3]
    model.eval()  # the stem's statistics would be those of the group
    in_evaluation, _ = losses_of_subnets(
        model, images, labels, subnets, Sampling(method="multi_architectural"), losses_of
    )
    for group, subnet in enumerate(ran):
        mine = slice(2 * group, 2 * group + 2)
        alone = per_sample_loss(model.extract(subnet)(images[mine]), labels[mine], Loss())
        torch.testing.assert_close(in_evaluation[mine], alone, rtol=1e-4, atol=1e-5)
    assert found.shape == (6,)


def test_every_weight_has_a_gradient_however_networks_run():
    """Ranks wait for each other's gradients, so one that is missing on any would hang them."""
    for model, method in (
        (MultiStageSupernet(CLASSES, "tiny"), "sandwich"),
        (VitResNas(CLASSES), "sandwich"),
        (VitResNas(CLASSES), "multi_architectural"),
    ):
        images, labels = batch(2)
        subnets = networks(model, 2)

        def losses_of(output, labels=labels):
            exits = output.logits if isinstance(output, Outputs) else (output,)
            return torch.stack([per_sample_loss(logits, labels, Loss()) for logits in exits]).sum(0)

        losses, _ = losses_of_subnets(model.train(), images, labels, subnets, Sampling(method=method), losses_of)
        losses.sum().backward()
        assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
        assert model.active == model.space.largest
