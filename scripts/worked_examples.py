"""The worked examples of the introductory articles through llmkit's engine: their figures, and the milk-tea plot.

    python scripts/worked_examples.py [--plot docs/images/milk-tea.png]

docs/worked-examples.md explains each of them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llmkit.losses import LossSum, squared_error
from llmkit.training.config import OptimConfig, RunConfig
from llmkit.training.engine import Engine

TEAS = [(30, 600), (25, 650), (20, 850), (15, 700), (10, 900), (5, 800)]  # (price, cups sold)
PLOTTED_EPOCHS = (0, 1, 5, 15, 20)


@dataclass(frozen=True)
class Points:
    """A batch: inputs, targets, and how many samples there are."""

    x: Tensor
    y: Tensor

    @property
    def denominator(self) -> float:
        return len(self.x)

    def to(self, device: torch.device) -> Points:
        return Points(self.x.to(device), self.y.to(device))


def half_squared_error(module: nn.Module, batch: Points) -> LossSum:
    """(prediction - target)^2 / 2, summed over the batch; the engine divides by the number of samples."""
    return squared_error(module(batch.x), batch.y)


def engine_for(module: nn.Module, lr: float, steps: int, optimizer: str = "sgd") -> Engine:
    """A bare optimizer: a constant rate, no weight decay, no clipping. fp64, for figures to compare with."""
    optim = OptimConfig(
        name=optimizer, lr=lr, schedule="constant", warmup_steps=0, weight_decay=0.0, clip=None, betas=(0.9, 0.999)
    )
    return Engine(module, RunConfig(out="unused", steps=steps, precision="fp64", optim=optim))


# --- milk tea --------------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """y = k x + b: a model of two parameters."""

    def __init__(self, k: float, b: float):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.k * x + self.b


@dataclass
class TeaStep:
    """What one update saw and did."""

    error: float
    gradient_k: float
    gradient_b: float
    k: float
    b: float


def milk_tea(epochs: int = 20) -> tuple[list[TeaStep], list[list[float]]]:
    """Stochastic gradient descent, one tea at a time, in the order of the list.

    Returns:
        Every update; and after 0, 1, ... epochs the error of each tea under the line as it then is.
    """
    line = Line(k=-10.0, b=1000.0)
    teas = [Points(torch.tensor([p], dtype=torch.float64), torch.tensor([s], dtype=torch.float64)) for p, s in TEAS]
    engine = engine_for(line, lr=1e-4, steps=epochs * len(teas))
    steps: list[TeaStep] = []
    errors = [tea_errors(engine, teas)]
    for _ in range(epochs):
        for tea in teas:
            metrics = engine.update([tea], half_squared_error)
            gradient = (engine.grads["k"].item(), engine.grads["b"].item())
            steps.append(TeaStep(metrics["loss"], *gradient, line.k.item(), line.b.item()))
        errors.append(tea_errors(engine, teas))
    return steps, errors


def tea_errors(engine: Engine, teas: list[Points]) -> list[float]:
    """The error of each tea, without learning from it."""
    with engine.evaluating() as line:
        return [half_squared_error(line, tea).total.item() for tea in teas]


def lines_after(steps: list[TeaStep]) -> dict[int, tuple[float, float]]:
    """(k, b) after the epochs that the article draws."""
    return {
        e: (steps[e * len(TEAS) - 1].k, steps[e * len(TEAS) - 1].b) if e else (-10.0, 1000.0) for e in PLOTTED_EPOCHS
    }


def plot_milk_tea(path: Path) -> None:
    """The teas and the line after 0, 1, 5, 15 and 20 epochs; beside them the mean error of every epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, errors = milk_tea()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), dpi=150, width_ratios=[1.6, 1])
    shades = plt.get_cmap("viridis_r")
    prices = [0, 37]
    for i, (epoch, (k, b)) in enumerate(lines_after(steps).items()):
        last = epoch == PLOTTED_EPOCHS[-1]
        label = f"{epoch:2d} epoch{'' if epoch == 1 else 's'}:  y = {k:.2f} x + {b:.2f}"
        color = "#c1272d" if last else shades(0.25 + 0.6 * i / (len(PLOTTED_EPOCHS) - 1))
        width, style, order = (
            (3.0, "-", 2) if last else (1.4, "--", 3)
        )  # the last lies under the one before, which it hides
        left.plot(prices, [k * p + b for p in prices], color=color, lw=width, ls=style, zorder=order, label=label)
    left.scatter(*zip(*TEAS, strict=True), color="#222222", s=42, zorder=5, label="the six teas")
    k, b = lines_after(steps)[20]
    at_35 = round(k, 2) * 35 + round(b, 2)
    left.scatter([35], [at_35], marker="*", color="#c1272d", s=150, zorder=6, label=f"price 35: {at_35:.0f} cups")
    left.set(xlabel="price", ylabel="cups sold", xlim=(0, 37), ylim=(480, 1040), title="The line as it learns")
    left.legend(loc="lower left", fontsize=8, framealpha=0.95)
    means = [sum(e) / len(e) for e in errors]
    right.plot(range(len(means)), means, color="#3b6fb6", marker="o", ms=3.5, lw=1.4)
    for epoch in PLOTTED_EPOCHS:
        shift = (6, 3) if epoch <= 5 else (-10, 7)
        right.annotate(
            f"{means[epoch]:.0f}", (epoch, means[epoch]), xytext=shift, textcoords="offset points", fontsize=8
        )
    right.set(xlabel="epochs", ylabel="mean of (prediction - sold)² / 2", title="Its mean error")
    right.set_xticks(PLOTTED_EPOCHS)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


# --- one hidden layer ------------------------------------------------------------------------------------------------


class HiddenLayer(nn.Module):
    """Two inputs, two hidden units, one output, sigmoid after each; no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 2, bias=False, dtype=torch.float64)
        self.output = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.tensor([[0.4, 0.9], [0.7, -0.3]], dtype=torch.float64))
            self.output.weight.copy_(torch.tensor([[0.5, 0.6]], dtype=torch.float64))

    def parts(self, x: Tensor) -> list[Tensor]:
        """Sums and activations, in the order in which they are computed."""
        hidden_sums = self.hidden(x)
        hidden = torch.sigmoid(hidden_sums)
        output_sum = self.output(hidden)
        return [hidden_sums, hidden, output_sum, torch.sigmoid(output_sum)]

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)[-1]


def hidden_layer(updates: int = 500) -> tuple[list[list[float]], float]:
    """The forward pass by parts, and the output after so many updates towards the target 0.2."""
    module = HiddenLayer()
    engine = engine_for(module, lr=1.0, steps=updates)
    sample = Points(torch.tensor([[0.5, -0.3]], dtype=torch.float64), torch.tensor([[0.2]], dtype=torch.float64))
    with engine.evaluating():
        parts = [p[0].tolist() for p in module.parts(sample.x)]
    for _ in range(updates):
        engine.update([sample], half_squared_error)
    with engine.evaluating():
        return parts, module(sample.x).item()


# --- linear regression -----------------------------------------------------------------------------------------------


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def linear_regression(steps: int = 800) -> tuple[float, float, float]:
    """Slope, intercept and the prediction at 6, by gradient descent on all five points at once."""
    module = nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.zero_(), module.bias.zero_()
    engine = engine_for(module, lr=0.15, steps=steps)
    data = Points(column([1, 2, 3, 4, 5]), column([2, 4, 5, 4, 5]))
    for _ in range(steps):
        engine.update([data], half_squared_error)
    with engine.evaluating():
        return module.weight.item(), module.bias.item(), module(column([6])).item()


# --- a small network -------------------------------------------------------------------------------------------------


INITIAL = {  # initial weights; biases are 0, but for torch's
    "He": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "Glorot (Keras)": nn.init.xavier_uniform_,
    "torch's default": None,
}


def small_network(seed: int, initial: str = "He", steps: int = 2000) -> float:
    """1-10-1 with ReLU, Adam at 1e-2 on y = 2 x, x = 1..5: what it says of 6."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(1, 10), nn.ReLU(), nn.Linear(10, 1))
    if INITIAL[initial] is not None:
        for layer in (module[0], module[2]):
            INITIAL[initial](layer.weight)
            nn.init.zeros_(layer.bias)
    engine = engine_for(module, lr=1e-2, steps=steps, optimizer="adamw")  # without weight decay AdamW is Adam
    data = Points(column([1, 2, 3, 4, 5]), column([2, 4, 6, 8, 10]))
    for _ in range(steps):
        engine.update([data], half_squared_error)
    with engine.evaluating():
        return module(column([6])).item()


# --- the report ------------------------------------------------------------------------------------------------------


def milk_tea_report() -> list[str]:
    """The figures that the article prints."""
    steps, errors = milk_tea()
    means = [sum(e) / len(e) for e in errors]
    first, second, last = steps[0], steps[1], steps[-1]
    rounded = round(last.k, 2) * 35 + round(last.b, 2)
    return [
        "milk tea",
        f"  errors at the start      {', '.join(f'{e:.0f}' for e in errors[0])}; mean {means[0]:.0f}",
        f"  after the first tea      k = {first.k:.1f}, b = {first.b:.2f}",
        f"  second tea               predicted {first.k * 25 + first.b:.2f}, error {second.error:.2f}, "
        f"gradients {second.gradient_k:.2f} and {second.gradient_b:.2f}",
        f"  mean error               {means[1]:.0f} after 1 epoch; falls by {means[10] - means[15]:.0f} from 10 to 15, "
        f"by {means[15] - means[20]:.0f} from 15 to 20",
        f"  after 20 epochs          y = {last.k:.2f} x + {last.b:.2f}; in full k = {last.k:.4f}, b = {last.b:.4f}",
        f"  price 35                 {rounded:.2f} with k and b rounded to two decimals, "
        f"{last.k * 35 + last.b:.2f} in full",
    ]


def networks_report() -> list[str]:
    """The figures of the other three examples."""
    (sums, hidden, (output_sum,), (output,)), learnt = hidden_layer()
    slope, intercept, at_six = linear_regression()
    answers = {initial: [small_network(seed, initial) for seed in range(10)] for initial in INITIAL}
    return [
        "one hidden layer",
        f"  sums of the hidden units {sums[0]:.2f}, {sums[1]:.2f}; hidden {hidden[0]:.4f}, {hidden[1]:.4f}",
        f"  output                   sum {output_sum:.4f}, output {output:.3f}, error {output - 0.2:.3f}",
        f"  after 500 updates        output {learnt:.3f}",
        "linear regression",
        f"  least squares            slope {slope:.2f}, intercept {intercept:.2f}, prediction at 6: {at_six:.2f}",
        "1-10-1 network, prediction at 6 over ten seeds",
        *(f"  {initial:24s} {min(a):.3f} to {max(a):.3f}" for initial, a in answers.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", type=Path, default=Path("docs/images/milk-tea.png"))
    args = parser.parse_args()
    print("\n".join([*milk_tea_report(), *networks_report()]))
    plot_milk_tea(args.plot)
    print(f"plot: {args.plot}")


if __name__ == "__main__":
    main()
