"""What a user can get wrong: the whole message, and the same one on every rank."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whalepy
from tests.pool import Pool
from whalepy.errors import AnnotationError, BatchError, CaptureError, ClusterError, PlanError, WhaleError

ROWS = torch.zeros(8, 6)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))).square().mean()


class Branching(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # line: branch
            x = x + 1
        return super().forward(x)


class Lossless(Mlp):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"out": self.up(x)}


class FixedRows(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(8, 6))  # line: fixed


class RootMean(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sqrt()  # line: root


def line(marker: str) -> str:
    """file:line of the line of this file that ends in `# line: marker`."""
    lines = Path(__file__).read_text().splitlines()
    return f"{Path(__file__).name}:{1 + next(k for k, text in enumerate(lines) if text.endswith('# line: ' + marker))}"


def planned(model: nn.Module, scopes: dict[str, Any], cluster: str = "2xcpu", x: Tensor = ROWS, **more: Any) -> Any:
    return whalepy.plan(whalepy.annotate(model, scopes), cluster, (x,), **more)


# Each row: what the user does, the kind of error, the message.
PLANS: dict[str, tuple[Callable[[], Any], type[WhaleError], str]] = {
    "illegal nesting": (
        lambda: planned(Mlp(), {"": whalepy.split(2), "up": whalepy.replicate(2)}),  # line: nesting
        AnnotationError,
        'replicate on "up" cannot stand inside split ({nesting})\n'
        "  at:  {nesting}\n"
        "  fix: inside split only plain operators may appear",
    ),
    "a pattern that matches nothing": (
        lambda: whalepy.annotate(Mlp(), {"layers.*": whalepy.split(2)}),  # line: pattern
        AnnotationError,
        'annotate: "layers.*" matches no module of Mlp that has a forward\n'
        "  at:  {pattern}\n"
        '  fix: its modules are "up", "down"',
    ),
    "a degree larger than every axis": (
        lambda: planned(Mlp(), {"": whalepy.split(16)}, "16xcpu"),  # line: degree
        AnnotationError,
        "no axis of this split can be cut into 16 parts\n"
        "  at:  {degree}\n"
        "  fix: choose a smaller degree, or put operators with a longer axis inside the scope",
    ),
    "on= names an axis that is too short": (
        lambda: planned(Mlp(), {"up": whalepy.split(8, on="up.weight:1")}, "8xcpu"),  # line: on
        AnnotationError,
        "split cannot cut up.weight:1 into 8 parts\n"
        "  at:  {on}\n"
        "  fix: name a dim of a parameter in this scope that operators can be cut along and that is long enough",
    ),
    "on= names nothing": (
        lambda: planned(Mlp(), {"": whalepy.split(2, on="none.weight:0")}),  # line: nothing
        AnnotationError,
        "on='none.weight:0' names no dim of a parameter of the model\n"
        "  at:  {nothing}\n"
        "  fix: write on='path.of.parameter:dim', as in named_parameters()",
    ),
    "fewer rows than replicas": (
        lambda: planned(Mlp(), {"": whalepy.replicate(3)}, "3xcpu", ROWS[:2]),  # line: rows
        PlanError,
        "example_inputs has 2 rows, too few for 3 replicas: 1 would get none\n"
        "  at:  {rows}\n"
        "  fix: give a larger global batch, a smaller degree, or more even shares",
    ),
    "shares that do not fit the degree": (
        lambda: whalepy.replicate(2, shares=[1, 2, 3]),  # line: shares
        AnnotationError,
        "replicate(shares=[1, 2, 3]): 3 shares for a degree of 2\n"
        "  at:  {shares}\n"
        "  fix: give one weight per part; without a degree, it is the number of shares",
    ),
    "shares that do not fit the devices": (
        lambda: planned(Mlp(), {"": whalepy.replicate(shares=[1, 2, 3])}),  # line: devices
        AnnotationError,
        "replicate(3, shares=(1, 2, 3)) and what is inside it need 3 devices; 2 of 2 are there for it\n"
        "  at:  {devices}\n"
        "  fix: choose degrees whose product divides 2, or give a cluster of another size",
    ),
    "a branch on data": (
        lambda: planned(Branching(), {"": whalepy.replicate(2)}),
        CaptureError,
        "the model takes a branch, or a size, that depends on the values in a tensor\n"
        "  at:  {branch}\n"
        "  fix: use torch.where or torch.cond; or give capture=False and loss_weight= to train the model whole, under "
        "one replicate level",
    ),
    "no loss": (
        lambda: planned(Lossless(), {"": whalepy.replicate(2)}),
        CaptureError,
        "the model returns a dict, in which there is no loss\n"
        "  fix: return the loss itself, an object with .loss, a mapping with 'loss', or a tuple whose first element is "
        "the loss; or pass loss_fn=",
    ),
    "a batch dim that the model fixes": (
        lambda: planned(FixedRows(), {"": whalepy.replicate(2)}),
        CaptureError,
        "the model fixes the number of rows: dim 0 of input args[0] comes out as a number\n"
        "  at:  {fixed}\n"
        "  fix: read it as x.shape[0], without int(), and never write it as a number; or give batch_dim=",
    ),
    "microbatches of a loss that is not additive": (
        lambda: planned(RootMean(), {"": whalepy.replicate(2)}, microbatches=2),
        PlanError,
        "the loss is not a sum over rows: aten.sqrt needs all rows at once, so microbatches would change it\n"
        "  at:  {root}\n"
        "  fix: leave out microbatches=, or make the loss a sum or a mean over rows",
    ),
    "no microbatch at all": (
        lambda: planned(Mlp(), {"": whalepy.replicate(2)}, microbatches=0),
        PlanError,
        "microbatches must be at least 1, not 0",
    ),
    "an option that is not there yet": (
        lambda: planned(Mlp(), {"": whalepy.replicate(2)}, precision="bf16"),
        WhaleError,
        "compile(..., precision='bf16') is not there yet\n  fix: leave out precision=",
    ),
    "no example inputs": (
        lambda: whalepy.plan(Mlp(), "2xcpu"),
        PlanError,
        "a plan needs example_inputs\n  fix: give one global batch; values do not matter",
    ),
}


@pytest.mark.parametrize(("use", "kind", "message"), PLANS.values(), ids=PLANS)
def test_planning(use: Callable[[], Any], kind: type[WhaleError], message: str) -> None:
    with pytest.raises(WhaleError) as error:
        use()
    assert str(error.value) == places_filled(message)
    assert type(error.value) is kind


def places_filled(message: str) -> str:
    for name in {part.split("}")[0] for part in message.split("{")[1:]}:
        message = message.replace("{" + name + "}", line(name))
    return message


# -- on several ranks


def compiled(cluster: str | None = "2xcpu", scopes: dict[str, Any] | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    model = whalepy.annotate(Mlp(), {"": whalepy.replicate(2, shares=(3, 1))} if scopes is None else scopes)
    return whalepy.compile(model, cluster, (ROWS,), **more)


def rank() -> int:
    return torch.distributed.get_rank()


def raised(use: Callable[[], Any]) -> tuple[str, str]:
    """The kind and the message of the error on this rank."""
    try:
        use()
    except WhaleError as error:
        return type(error).__name__, str(error)
    return "none", ""


def rows_of_another_rank() -> Any:
    return compiled().train_step(ROWS[:4])


def too_many_rows_on_one_rank() -> Any:
    return compiled().train_step(ROWS[: 5 - 2 * rank()])


def inputs_that_disagree() -> Any:
    class Two(Mlp):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + y)

    parallel = whalepy.compile(whalepy.annotate(Two(), {"": whalepy.replicate(2)}), "2xcpu", (ROWS, ROWS))
    return parallel.train_step(ROWS[:4], ROWS[: 4 - rank()])


def lengths_that_differ() -> Any:
    parallel = whalepy.compile(whalepy.annotate(Mlp(), {"": whalepy.replicate(2)}), "2xcpu", (torch.zeros(8, 5, 6),))
    return parallel.train_step(torch.zeros(4, 5 + rank(), 6))


def dtypes_that_differ() -> Any:
    local = ROWS[: 6 - 4 * rank()]
    return compiled().train_step(local.double() if rank() else local)


def a_step_more_on_one_rank() -> Any:
    parallel = compiled()
    parallel._step += rank()
    return parallel.train_step(ROWS[: 6 - 4 * rank()])


def another_model_on_one_rank() -> Any:
    class Other(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x))).square().mean()

    model = Other() if rank() else Mlp()
    return whalepy.compile(whalepy.annotate(model, {"": whalepy.replicate(2)}), "2xcpu", (ROWS,))


def a_cluster_of_more_devices() -> Any:
    return compiled("3xcpu")


def a_cluster_of_another_type() -> Any:
    return compiled("2x4090")


def an_error_on_one_rank() -> Any:
    model = Branching() if rank() == 1 else Mlp()
    return whalepy.compile(whalepy.annotate(model, {"": whalepy.replicate(2)}), "2xcpu", (ROWS,))


def keys_of_another_model() -> Any:
    return compiled().load_full_state_dict({"up.weight": torch.zeros(12, 6)})


def gradients_asked_for() -> Any:
    return compiled()(ROWS[: 6 - 4 * rank()])


def parameters_before_the_capture() -> Any:
    return list(whalepy.compile(Mlp(), "2xcpu").parameters())


def a_norm_of_zero() -> Any:
    return compiled().clip_grad_norm_(1.0, norm_type=0.0)


def a_plan_for_more_devices() -> Any:
    made = whalepy.plan(whalepy.annotate(Mlp(), {"": whalepy.replicate(3)}), "3xcpu", (ROWS,))
    return compiled(plan=made)


def a_plan_for_other_devices() -> Any:
    made = whalepy.plan(whalepy.annotate(Mlp(), {"": whalepy.replicate(2)}), "2xT4", (ROWS,))
    return compiled(plan=made)


OTHER_CLUSTER = "  fix: give the cluster that it was planned for, or plan anew for this one"
MISFIT = "ranks were given {} rows of args[0]; the plan's shares of 8 rows are [6, 2]\n" + (
    "  fix: give each rank parallel.local_batch(global_batch), or a DataLoader with parallel.sampler(dataset)"
)
MISMATCH = "the ranks do not match the cluster\n  spec:  node 0: {}\n  ranks: {{host}}: 2xcpu\n" + (
    "  fix: start one rank per device of the spec, on hosts with the same types as its nodes, or change the spec"
)
RANKS: dict[Callable[[], Any], tuple[type[WhaleError], str]] = {
    rows_of_another_rank: (BatchError, MISFIT.format([4, 4])),
    too_many_rows_on_one_rank: (BatchError, MISFIT.format([5, 3])),
    inputs_that_disagree: (BatchError, "rank 1: inputs disagree on their rows: args[0] has 4, args[1] has 3"),
    lengths_that_differ: (BatchError, "args[0] has shape [4, 6, 6] on rank 1 and [4, 5, 6] on rank 0"),
    dtypes_that_differ: (
        BatchError,
        "args[0] is torch.float64 on rank 1 and torch.float32 on rank 0\n"
        "  fix: give every rank the same inputs, each with its own rows",
    ),
    a_step_more_on_one_rank: (BatchError, "ranks are at different steps: [0, 1]"),
    another_model_on_one_rank: (
        PlanError,
        "rank 1 has another model than rank 0: tanh (aten.tanh) on rank 0, relu (aten.relu) on rank 1\n"
        "  fix: build the same model with the same annotations and example shapes on every rank",
    ),
    a_cluster_of_more_devices: (ClusterError, MISMATCH.format("3xcpu")),
    a_cluster_of_another_type: (ClusterError, MISMATCH.format("2xRTX-4090")),
    an_error_on_one_rank: (CaptureError, PLANS["a branch on data"][2]),
    a_plan_for_more_devices: (PlanError, "the plan is for 3 devices, the cluster has 2\n" + OTHER_CLUSTER),
    a_plan_for_other_devices: (PlanError, "device 0 of the plan is T4, that of the cluster is cpu\n" + OTHER_CLUSTER),
    keys_of_another_model: (
        WhaleError,
        "the state does not fit the model: missing ['down.bias', 'down.weight', 'up.bias'], unexpected []",
    ),
    gradients_asked_for: (
        WhaleError,
        "parallel(...) with gradients is not there yet\n"
        "  fix: call parallel.train_step(...) to train, or wrap the call in torch.no_grad()",
    ),
    parameters_before_the_capture: (
        WhaleError,
        "the model is not captured yet: compile was given no example_inputs\n"
        "  fix: give compile example_inputs=, or call parallel.local_batch(global_batch) first",
    ),
    a_norm_of_zero: (WhaleError, "norm_type must be positive, not 0.0"),
}


@pytest.mark.parametrize("use", RANKS, ids=lambda use: use.__name__)
def test_all_ranks_raise_alike(workers: Pool, use: Callable[[], Any]) -> None:
    kind, message = RANKS[use]
    expected = kind.__name__, places_filled(message.replace("{host}", socket.gethostname()))
    assert workers.run(2, raised, use) == [expected, expected]


def raised_and_trained(use: Callable[[], Any]) -> list[float]:
    """The loss of a step after the error of another: nobody is left waiting, nothing has changed."""
    parallel = compiled()
    before = parallel.train_step(ROWS[: 6 - 4 * rank()])
    assert raised(lambda: parallel.train_step(ROWS[:4]))[0] == "BatchError"
    parallel.zero_grad()
    return [float(before), float(parallel.train_step(ROWS[: 6 - 4 * rank()]))]


def test_a_step_after_an_error_runs(workers: Pool) -> None:
    (first, second), other = workers.run(2, raised_and_trained, None)
    assert first == second
    assert other == [first, second]
