"""The worked examples of the introductory articles, to the digits they print: the engine is not tied to GPT."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def examples() -> ModuleType:
    spec = importlib.util.spec_from_file_location("worked_examples", ROOT / "scripts" / "worked_examples.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# --- milk tea --------------------------------------------------------------------------------------------------------


def test_milk_tea_start(examples: ModuleType) -> None:
    """Errors before training, then the first two updates."""
    steps, errors = examples.milk_tea(epochs=1)
    assert errors[0] == [5000, 5000, 1250, 11250, 0, 11250] and sum(errors[0]) / 6 == 5625
    first, second = steps[:2]
    assert (first.gradient_k, first.gradient_b) == (3000, 100)
    assert (first.k, first.b) == pytest.approx((-10.3, 999.99), abs=1e-12)
    assert first.k * 25 + first.b == pytest.approx(742.49, abs=1e-9)
    shown = (second.error, second.gradient_k, second.gradient_b)
    assert tuple(round(x, 2) for x in shown) == (4277.20, 2312.25, 92.49)


def test_milk_tea_end(examples: ModuleType) -> None:
    """Twenty epochs: the errors on the way, the line, and what it says of a price of 35."""
    steps, errors = examples.milk_tea()
    means = [sum(e) / len(e) for e in errors]
    assert len(steps) == 120 and round(means[1]) == 4847
    assert round(means[10] - means[15]) == 17 and round(means[15] - means[20]) == 2
    k, b = steps[-1].k, steps[-1].b
    assert (round(k, 4), round(b, 4)) == (-13.2649, 999.6437)
    assert round(round(k, 2) * 35 + round(b, 2), 2) == 535.54
    assert round(k * 35 + b, 2) == 535.37
    lines = examples.lines_after(steps)
    assert list(lines) == [0, 1, 5, 15, 20] and lines[0] == (-10.0, 1000.0) and lines[20] == (k, b)


def test_milk_tea_is_plain_sgd(examples: ModuleType) -> None:
    """All 120 updates against four lines of Python."""
    steps, k, b = examples.milk_tea()[0], -10.0, 1000.0
    for i, step in enumerate(steps):
        price, sold = examples.TEAS[i % 6]
        error = k * price + b - sold
        k, b = k - 1e-4 * error * price, b - 1e-4 * error
        assert (step.k, step.b) == pytest.approx((k, b), rel=1e-14)


def test_milk_tea_plot(examples: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    examples.plot_milk_tea(tmp_path / "images" / "tea.png")
    assert (tmp_path / "images" / "tea.png").read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "docs" / "images" / "milk-tea.png").is_file()


# --- the others ------------------------------------------------------------------------------------------------------


def test_hidden_layer(examples: ModuleType) -> None:
    """The forward pass to the article's digits; then the engine learns the target."""
    (sums, hidden, (output_sum,), (output,)), learnt = examples.hidden_layer()
    assert sums == pytest.approx([-0.07, 0.44], abs=1e-12)
    assert [round(h, 4) for h in hidden] == [0.4825, 0.6083]
    # The article adds products that it has rounded: 0.2413 + 0.3650 = 0.6063. In full it is 0.6062.
    assert round(output_sum, 4) == 0.6062
    products = [round(w * round(h, 4) + 1e-9, 4) for w, h in zip((0.5, 0.6), hidden, strict=True)]
    assert round(sum(products), 4) == 0.6063
    assert round(output, 3) == 0.647 and round(output - 0.2, 3) == 0.447
    assert learnt == pytest.approx(0.2, abs=5e-3)


def test_linear_regression(examples: ModuleType) -> None:
    """Gradient descent ends where least squares does. The article's 1.6 and 5.2 do not follow from its data."""
    found = examples.linear_regression()
    assert found == pytest.approx((0.6, 2.2, 5.8), abs=1e-6)
    assert found[:2] == pytest.approx(np.polyfit([1, 2, 3, 4, 5], [2, 4, 5, 4, 5], 1), abs=1e-6)


def test_small_network(examples: ModuleType) -> None:
    """Ten seeds, 2000 updates: 11.99 to 12.00 at 6 from He's initial weights."""
    answers = [examples.small_network(seed) for seed in range(10)]
    assert min(answers) >= 11.99 and max(answers) < 12.005


def test_small_network_at_keras_rate(examples: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The article's own setting, 100 updates at 1e-3, does not give the 11.97 that it prints."""
    slow = examples.engine_for
    monkeypatch.setattr(examples, "engine_for", lambda module, lr, **rest: slow(module, lr=1e-3, **rest))
    answers = [examples.small_network(seed, "Glorot (Keras)", steps=100) for seed in range(10)]
    assert max(answers) < 11 and all(map(math.isfinite, answers))


# --- the page --------------------------------------------------------------------------------------------------------


def test_page_shows_the_real_code_and_figures(examples: ModuleType) -> None:
    """Every Python snippet of the tutorial is a piece of the script, and the milk-tea output is what it prints."""
    page = (ROOT / "docs" / "worked-examples.md").read_text("utf-8")
    script = (ROOT / "scripts" / "worked_examples.py").read_text("utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(snippets) >= 5
    for snippet in snippets:
        assert snippet in script, f"not in the script:\n{snippet}"
    for line in examples.milk_tea_report():
        assert line in page
