"""Pictures: real files of the right kind, names drawn as they are, legible at any size."""

from __future__ import annotations

import itertools
import os
import sys
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize, SymLogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

import noesis
from helpers.processes import in_threads, python
from noesis import plots
from noesis.errors import BadValue, MissingExtra
from noesis.plots import names, scales, style

#: What formulas, formats, legends and fonts are made to trip over.
AWKWARD = ["$x_1$", "_head", "100%s {} \\frac{1}{0}", "a\nb\tc", "ä.漢字.☃", "$", ""]


def soulprint(names: list[str], seed: int = 0, **meta: Any) -> noesis.Soulprint:
    rng = np.random.default_rng(seed)
    return noesis.Soulprint(rng.normal(size=len(names)), np.exp(rng.normal(size=len(names))), names, meta=meta)


def rows_of(names: list[str], *, judged: bool) -> list[Any]:
    a = soulprint(names)
    rng = np.random.default_rng(1)
    b = noesis.Soulprint(a.means + 0.01 * rng.normal(size=len(names)), a.stds, names)
    b.means[1] += 3
    baseline = [noesis.Soulprint(a.means + 0.01 * rng.normal(size=len(names)), a.stds, names) for _ in range(8)]
    return noesis.compare(a, b, baseline=baseline if judged else None).rows


def many(count: int) -> list[str]:
    return [
        f"down_blocks.{i // 100}.attentions.{i // 10 % 10}.transformer_blocks.{i % 10}.attn1.to_q" for i in range(count)
    ]


def pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # matplotlib's own, when a user draws
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def notes(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def row_labels(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def draw(kind: str, names: list[str], path: Path | None = None) -> Figure:
    """Each of the public pictures, over the given layers."""
    if kind == "heat_map":
        return plots.heat_map(np.outer(np.arange(len(names)), [1.0, 2.0, 3.0]), names, range(3), title="t", path=path)
    if kind == "bars":
        return plots.bars([soulprint(names), soulprint(names, 1)], path=path)
    return plots.effects(rows_of(names, judged=True), path=path)


KINDS = pytest.mark.parametrize("kind", ["heat_map", "bars", "effects"])


# ---------------------------------------------------------------- files


@KINDS
def test_png_is_a_picture(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "p.png"
    figure = draw(kind, ["a", "b", "c"], path)
    image = imread(path)
    width, height = figure.get_size_inches() * figure.dpi
    assert image.shape[:2] == (round(height), round(width))
    assert image.std() > 0.05, "blank"
    assert list(path.parent.iterdir()) == [path], "a temporary file stayed"


@KINDS
def test_svg_and_pdf(kind: str, tmp_path: Path) -> None:
    draw(kind, ["a", "b", "c"], tmp_path / "p.svg")
    assert ET.parse(tmp_path / "p.svg").getroot().tag.endswith("}svg")
    draw(kind, ["a", "b", "c"], tmp_path / "p.PDF")
    assert (tmp_path / "p.PDF").read_bytes().startswith(b"%PDF-")


@KINDS
@pytest.mark.parametrize("name", ["p.jpg", "p", "p.svgz"])
def test_unknown_suffix(kind: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r"suffix '.*'\. Expected \.png, \.svg, \.pdf\. Rename the file"):
        draw(kind, ["a", "b", "c"], tmp_path / name)
    assert not list(tmp_path.iterdir())


@KINDS
def test_a_failed_write_leaves_the_old_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        draw(kind, ["a", "b", "c"], path)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("p.png", b"old")]


# ---------------------------------------------------------------- names are data


@KINDS
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_awkward_names(kind: str, suffix: str, tmp_path: Path) -> None:
    figure = draw(kind, AWKWARD, tmp_path / f"p.{suffix}")
    assert sorted(row_labels(figure)) == sorted([*AWKWARD[:3], "a·b·c", *AWKWARD[4:]])


def test_names_are_no_formulas(tmp_path: Path) -> None:
    with rc_context({"svg.fonttype": "none"}):  # text as text, so that it can be read
        draw("bars", AWKWARD, tmp_path / "p.svg")
    written = {"".join(each.itertext()).strip() for each in ET.parse(tmp_path / "p.svg").getroot().iter()}
    assert {"$x_1$", "_head", "100%s {} \\frac{1}{0}", "$"} <= written


def test_awkward_titles_columns_and_runs() -> None:
    figure = plots.heat_map(np.ones((1, 7)), ["a"], AWKWARD, title="$\\broken{$ and _ 100%")
    pixels(figure)
    assert figure.axes[0].get_title(loc="left") == "$\\broken{$ and _ 100%"
    assert "$x_1$" in [label.get_text() for label in figure.axes[0].get_xticklabels()]
    figure = plots.bars([soulprint(["x"], run="_first $"), soulprint(["x"], run="$\\second{$")])
    pixels(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["run _first $", "run $\\second{$"]


def test_a_long_name_keeps_its_numbers_and_its_end() -> None:
    assert plots.shortened("blocks.3.mlp") == "blocks.3.mlp"
    paths = many(400)
    assert len({plots.shortened(path) for path in paths}) == 400
    assert max(len(plots.shortened(path)) for path in paths) <= names.LONGEST_LABEL
    assert plots.shortened("x" * 50, 21) == "x" * 10 + "…" + "x" * 10
    assert plots.shortened(".".join("abcd" * 20), 21) == "a.b.c.d.a.….c.d.a.b.c.d"[:10] + "…" + ".b.c.d.a.b.c.d"[-10:]


# ---------------------------------------------------------------- legible at any size


@KINDS
@pytest.mark.parametrize("count", [1, 4, 60, 61, 400])
@pytest.mark.slow
def test_labels_do_not_overlap(kind: str, count: int) -> None:
    figure = draw(kind, many(max(count, 2)))
    pixels(figure)  # places the labels
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) >= min(count, 40), "too few labels"
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0, "a label is cut off"
    width, height = figure.get_size_inches()
    assert width <= 13
    assert height <= style.TALLEST


@pytest.mark.parametrize("columns", [list(range(2000)), [f"token number {i}" for i in range(120)]])
def test_column_labels_do_not_overlap(columns: list[Any]) -> None:
    figure = plots.heat_map(np.ones((3, len(columns))), ["a", "b", "c"], columns, title="t")
    pixels(figure)
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) >= 8
    assert all(left.x1 <= right.x0 + 1 for left, right in itertools.pairwise(boxes))
    assert min(box.y0 for box in boxes) >= 0, "a label is cut off"


def test_paths_that_are_alike_are_cut_where_they_are() -> None:
    paths = [f"model.text.encoder.layers.{i}.attention.self_attention.fused.{name}" for i in (0, 11) for name in "qk"]
    short = [f"model.text.encoder.layers.{i}…fused.{name}" for i in (0, 11) for name in "qk"]
    assert names.shortened_names(paths) == short
    assert names.shortened_names([*paths, "model.short"]) == [*short, "model.short"]
    other = "model.text.encoder.layers.0.attention.cross_attention.fused.q"
    found = [f"model.text…0…{kind}_attention.fused.q" for kind in ("self", "cross")]
    assert names.shortened_names([paths[0], other]) == found
    assert names.shortened_names(["a.b", "a.b.c"]) == ["a.b", "a.b.c"]


def test_names_that_differ_stay_different() -> None:
    long = "x" * 60
    paths = [*many(400), *(f"{long}.{i}.{long}" for i in range(3)), f"{'y' * 25}a{'y' * 25}", f"{'y' * 25}b{'y' * 25}"]
    assert len(set(names.shortened_names(paths))) == len(paths)


def test_runs_are_named_by_what_differs() -> None:
    same = {"prompt": "a coat", "seed": 3, "model": "/somewhere/small"}
    ids = [{"run": "0123456789ab", "pipeline_calls": 1}, {"run": "ba9876543210", "pipeline_calls": 2}]
    one, other = ({**same, **each} for each in ids)
    assert names.run_names([one, other]) == ["a", "b"]
    assert names.run_names([one, {**other, "seed": 4}]) == ["seed 3", "seed 4"]
    assert names.run_names([one, {**other, "seed": [4]}]) == ["seed 3", "seed 4"]
    assert names.run_names([one, {**other, "prompt": "a boot"}]) == ["“a coat”", "“a boot”"]
    both = names.run_names([one, {**other, "prompt": "a boot", "seed": None, "note": "x"}])
    assert both == ["“a coat”, seed 3", "“a boot”, no seed"]
    assert names.run_names([one, {**other, "model": "/elsewhere/large/"}]) == ["model small", "model large"]
    assert names.run_names([{"eta": 0.0}, {"eta": 1.0}]) == ["eta 0.0", "eta 1.0"]
    assert names.run_names([{"run": "1795207852"}, {"run": "1795207854"}]) == ["a", "b"], "ids of v0.1"
    assert names.run_names([{"run": "first"}, {"run": "second"}]) == ["run first", "run second"]
    long = names.run_names([{"prompt": "p" * 500}, {"prompt": "p" * 501}])
    assert [name[:3] for name in long] == ["a: ", "b: "]
    assert max(map(len, long)) <= names.LONGEST_RUN + 5


def test_thinned() -> None:
    assert style.thinned(7, 7) == list(range(7))
    assert style.thinned(400, 99) == list(range(0, 400, 5))
    assert style.thinned(3, 0) == [0]


@pytest.mark.parametrize("kind", ["heat_map", "bars", "effects", "histograms", "token_map"])
def test_every_axis_and_colour_bar_is_labelled(kind: str) -> None:
    if kind == "histograms":
        figure = plots.histograms({"in": [1.0, 2.0]})
    elif kind == "token_map":
        figure = plots.token_map(np.ones((2, 1)), "ab", ["fc"], loud=[False] * 2, breaks=[], least=1e-6, title="t")
    else:
        figure = draw(kind, ["a", "b", "c"])
    assert figure.axes[0].get_ylabel()
    for axes in figure.axes:
        bar = axes.get_label() == "<colorbar>"
        assert axes.get_ylabel() if bar else axes.get_xlabel()


def test_how_many_rows_are_named_is_said() -> None:
    assert draw("heat_map", many(400)).axes[0].get_ylabel() == "row (80 of 400 are named)"
    assert draw("heat_map", many(4)).axes[0].get_ylabel() == "row"


# ---------------------------------------------------------------- heat maps


def colour_of(figure: Figure, value: float) -> str:
    image = figure.axes[0].images[0]
    return to_hex(image.cmap(image.norm(np.ma.masked_invalid([value])))[0])


def key_of(figure: Figure) -> dict[str, str]:
    """Colours by what the key says they mean."""
    legend = figure.axes[0].get_legend()
    if legend is None:
        return {}
    colours = [to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
    return dict(zip([text.get_text() for text in legend.get_texts()], colours, strict=True))


def share_of(figure: Figure, colour: str) -> float:
    """How much of the picture has a colour."""
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return float((pixels(figure)[..., :3] == wanted).all(-1).mean())


def test_what_has_no_value_is_grey_and_what_is_not_finite_is_red() -> None:
    table = np.array([[1.0, np.nan], [np.inf, 2.0]])
    figure = plots.heat_map(table, ["a", "b"], [0, 1], title="t")
    assert figure.axes[0].images[0].get_array().mask.tolist() == [[False, True], [True, False]]
    assert figure.axes[0].images[1].get_array().mask.tolist() == [[True, True], [False, True]]
    assert figure.axes[0].collections[0].get_offsets().tolist() == [[0, 1]], "no cross"
    assert key_of(figure) == {"NaN or infinity": style.LOUD, "no value": style.MISSING}
    assert share_of(figure, style.MISSING) > 0.1
    assert share_of(figure, style.LOUD) > 0.1
    assert key_of(plots.heat_map(np.ones((1, 1)), ["a"], [0], title="t")) == {}


def test_which_cells_are_not_finite_can_be_said() -> None:
    marks = np.array([[False, True, True, False, True], [False] * 5])
    figure = plots.heat_map(np.ones((2, 5)), ["a", "b"], range(5), title="t", nonfinite=marks)
    assert figure.axes[0].collections[0].get_offsets().tolist() == [[1, 0], [4, 0]], "a cross where red begins"
    assert key_of(figure) == {"NaN or infinity": style.LOUD}
    with pytest.raises(BadValue, match=r"nonfinite of shape \(5, 2\) for a table of shape \(2, 5\)"):
        plots.heat_map(np.ones((2, 5)), ["a", "b"], range(5), title="t", nonfinite=marks.T)


@pytest.mark.parametrize(
    "shape", [(3, 4), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((40, 60), (400, 2000)))]
)
def test_one_cell_that_is_not_finite_is_seen_at_any_size(shape: tuple[int, int]) -> None:
    marks = np.zeros(shape, dtype=bool)
    marks[2, 3] = True
    figure = plots.heat_map(np.ones(shape), range(shape[0]), range(shape[1]), title="t", nonfinite=marks)
    assert share_of(figure, style.LOUD) * pixels(figure)[..., 0].size > 60, "pixels"


@pytest.mark.parametrize("shape", [(4, 5), (20, 30)])
def test_an_outlier_does_not_hide_the_rest(shape: tuple[int, int]) -> None:
    table = np.linspace(1, 2, shape[0] * shape[1]).reshape(shape)
    table[3, 3] = 50
    figure = plots.heat_map(table, range(shape[0]), range(shape[1]), title="t")
    low, high = figure.axes[0].images[0].get_clim()
    assert 0.9 < low < 1.1
    assert 1.9 < high < 2.1
    assert figure.axes[0].images[0].colorbar.extend == "max"
    assert key_of(figure) == {"above the scale, up to 50": style.ABOVE}
    assert colour_of(figure, 50.0) == style.ABOVE


def test_without_outliers_nothing_is_cut_off() -> None:
    table = np.random.default_rng(0).uniform(1, 2, (4, 5))
    image = plots.heat_map(table, range(4), range(5), title="t").axes[0].images[0]
    assert image.get_clim() == (table.min(), table.max())
    assert image.colorbar.extend == "neither"


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_signs_have_a_white_middle(sign: float) -> None:
    figure = plots.heat_map([[-1.0 * sign, 0.0, 3.0 * sign]], ["a"], range(3), title="t")
    assert figure.axes[0].images[0].get_clim() == (-3.0, 3.0)
    assert colour_of(figure, 0.0) == to_hex(colormaps["BrBG_r"](0.5))


def test_powers_of_ten() -> None:
    image = plots.heat_map([[1.0, 10.0, 1000.0]], ["a"], range(3), title="t").axes[0].images[0]
    assert isinstance(image.norm, LogNorm)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_explosion_is_seen_beside_zeros(sign: float) -> None:
    sizes = np.geomspace(8e-6, 8e3, 10)
    norm = plots.heat_map([[0.0, *(sign * sizes)]], ["a"], range(11), title="t").axes[0].images[0].norm
    assert isinstance(norm, SymLogNorm)
    shares = np.sort(norm([0.0, *(sign * sizes)]))
    assert (shares[0], shares[-1]) == pytest.approx((0.0, 1.0))
    assert np.diff(shares).min() > 0.08, "two of eleven look alike"


def test_both_signs_by_powers_of_ten_have_a_white_middle() -> None:
    sizes = np.geomspace(0.01, 700, 20)
    figure = plots.heat_map([np.concatenate([-sizes, sizes])], ["a"], range(40), title="t")
    norm = figure.axes[0].images[0].norm
    assert isinstance(norm, SymLogNorm)
    assert (norm.vmin, norm.vmax) == pytest.approx((-700, 700))
    assert colour_of(figure, 0.0) == to_hex(colormaps["BrBG_r"](0.5))
    assert norm(10.0) - norm(1.0) > 0.05
    ticks = figure.axes[0].images[0].colorbar.get_ticks()
    assert 0 in ticks
    assert figure.axes[1].get_ylim() == pytest.approx((-700, 700)), "the bar ends where its colours do"
    assert min(abs(at) for at in ticks if at) >= norm.linthresh, "labels upon that of zero"


def test_normal_numbers_are_linear() -> None:
    table = np.random.default_rng(0).normal(size=(20, 30))
    assert type(plots.heat_map(table, range(20), range(30), title="t").axes[0].images[0].norm) is Normalize


def test_one_far_outlier_is_no_reason_for_powers_of_ten() -> None:
    values = np.append(np.linspace(1, 2, 100), 1e6)
    scale = scales.scale_of(values)
    assert type(scale.norm) is Normalize
    assert (scale.norm.vmax, scale.extend) == (pytest.approx(2, rel=0.02), "max")


def test_a_scale_by_the_numbers_themselves() -> None:
    """A small number is pale, and the one large one is no outlier."""
    table = np.zeros((4, 8))
    table[2, 5], table[1, 3], table[0, 0] = 1.0, 0.01, np.nan
    figure = plots.heat_map(table, "abcd", range(8), title="t", scale="linear")
    norm = figure.axes[0].images[0].norm
    assert type(norm) is Normalize
    assert (norm.vmin, norm.vmax) == (-1, 1)
    assert key_of(figure) == {"no value": style.MISSING}
    assert scales.linear_scale(np.zeros(0)).norm.vmax == 1


def test_a_scale_for_each_row() -> None:
    table = np.array([[1.0, 2.0, 3.0], [1e6, 3e6, 2e6], [1e-6, 1.0, 1e6], [5.0, 5.0, 5.0], [np.nan] * 3])
    figure = plots.heat_map(table, "abcde", range(3), title="t", scale="row", colour_bar="std")
    shares = figure.axes[0].images[0].get_array()
    assert shares[:4].tolist() == pytest.approx(np.array([[0, 0.5, 1], [0, 1, 0.5], [0, 0.5, 1], [0.5] * 3]))
    assert shares[4].mask.all()
    (beside,) = figure.axes[0].child_axes
    ranges = [label.get_text() for label in beside.get_yticklabels()]
    assert ranges == ["1 … 3", "1e+06 … 3e+06", "1e-06 … 1e+06 (log)", "5", ""]
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["lowest", "highest"]
    with pytest.raises(BadValue, match='scale=\'layer\'. Expected "all", "row" or "linear"'):
        plots.heat_map(table, "abcde", range(3), title="t", scale="layer")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, 1e-300, 1e300, np.nan])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7)])
def test_a_constant_table(value: float, shape: tuple[int, int]) -> None:
    pixels(plots.heat_map(np.full(shape, value), range(shape[0]), range(shape[1]), title="t"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 3), r"shape \(0, 3\)\. Expected \[rows, columns\]"),
        ((2, 0), r"shape \(2, 0\)\. Expected \[rows, columns\]"),
        ((2,), r"shape \(2,\)\. Expected \[rows, columns\]"),
        ((2, 2), r"shape \(2, 2\) with 2 row and 3 column labels\. Expected one label for each"),
        ((3, 3), r"shape \(3, 3\) with 2 row and 3 column labels\. Expected one label for each"),
    ],
)
def test_bad_tables(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(BadValue, match=message):
        plots.heat_map(np.ones(shape), ["a", "b"], [0, 1, 2], title="t")


# ---------------------------------------------------------------- bars


@pytest.mark.parametrize("extra", [0, 100])
def test_two_runs_are_matched_by_name(extra: int) -> None:
    more = [f"more.{i}" for i in range(extra)]
    a = noesis.Soulprint([1.0, 2.0, *[0.0] * extra], [1.0, 1.0, *[1.0] * extra], ["x", "y", *more])
    b = noesis.Soulprint([20.0, 30.0, *[0.0] * extra], [1.0, 1.0, *[1.0] * extra], ["y", "z", *more])
    axes = plots.bars([a, b]).axes[0]
    names = ["x", "y", *more, "z"]
    first = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in axes.patches[: len(names)]}
    if extra:  # drawn as marks
        second = {round(marks[:, 1].mean()): marks[0, 0] for marks in axes.collections[0].get_segments() if len(marks)}
    else:
        second = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in axes.patches[len(names) :]}
    at = {name: place for place, name in enumerate(names)}
    assert (first[at["x"]], first[at["y"]]) == (1.0, 2.0)
    assert (second[at["y"]], second[at["z"]]) == (20.0, 30.0)
    assert np.isnan(first[at["z"]])
    assert np.isnan(second.get(at["x"], np.nan))


def test_one_run_has_no_legend() -> None:
    assert not plots.bars([soulprint(["a", "b"])]).legends


def test_runs_without_names_are_a_and_b() -> None:
    figure = plots.bars([soulprint(["x"], run="same"), soulprint(["x"], run="same")])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_a_few_giants_do_not_hide_the_rest() -> None:
    small, giant = [1.0, 1.1, 0.9, 1.2], [1.0, 1.1, 0.9, 5000.0]
    names = ["a", "b", "c", "d"]
    figure = plots.bars([noesis.Soulprint(small, giant, names)])
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "symlog"]


def test_what_is_not_finite_has_no_bar() -> None:
    pixels(plots.bars([noesis.Soulprint([np.nan, 1.0], [np.inf, 1.0], ["a", "b"])]))
    pixels(plots.bars([noesis.Soulprint([np.nan], [np.nan], ["a"])] * 2))


@pytest.mark.parametrize("count", [0, 3])
def test_bars_of_one_or_two(count: int) -> None:
    with pytest.raises(BadValue, match=f"{count} soulprints. Expected one or two"):
        plots.bars([soulprint(["a"])] * count)
    with pytest.raises(BadValue, match=r"no layers. Expected at least one"):
        plots.bars([soulprint([])])


@pytest.mark.data
@pytest.mark.slow
def test_real_soulprints(data: Path) -> None:
    a, b = (noesis.Soulprint.load(data / "noesis_v01" / run / "soulprint.json") for run in ("run_a", "run_b"))
    assert pixels(a.plot(b)).std() > 1


# ---------------------------------------------------------------- effects


def test_how_many_layers_of_how_many() -> None:
    rows = rows_of(["a", "b", "c"], judged=False)
    assert plots.effects(rows[:2], layers=3).axes[0].get_title(loc="left") == "effect by layer, 2 of 3 layers"
    assert plots.effects(rows, layers=3).axes[0].get_title(loc="left") == "effect by layer"


def test_a_comparison_says_of_what() -> None:
    a, b = soulprint(many(40), 2), soulprint(many(40), 1)
    a.meta, b.meta = {"seed": 7}, {"seed": 8}
    figure = a.compare(b).plot()
    assert figure.axes[0].get_title(loc="left") == "effect by layer, 25 of 40 layers"
    assert figure.axes[0].texts[-1].get_text() == "from seed 7 to seed 8"


def bar_colours(figure: Figure) -> list[str]:
    return [to_hex(bar.get_facecolor()) for bar in figure.axes[0].patches]


def test_changed_layers_stand_out() -> None:
    rows = rows_of(["a", "b", "c", "d"], judged=True)
    figure = plots.effects(rows)
    assert row_labels(figure)[0] == "b"
    assert bar_colours(figure) == [style.LOUD, *[style.QUIET] * 3]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [row.effect for row in rows]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["changed", "within the noise of the baseline"]
    bottom, top = figure.axes[0].get_ylim()
    assert bottom > top, "the most changed layer is on top"


def test_without_a_baseline_nothing_is_called_changed() -> None:
    figure = plots.effects(rows_of(["a", "b", "c"], judged=False))
    assert set(bar_colours(figure)) == {style.FIRST}
    assert figure.axes[0].get_legend() is None


def test_equal_runs_have_empty_bars() -> None:
    a = soulprint(["x", "y"])
    pixels(plots.effects(noesis.compare(a, a).rows))
    with pytest.raises(BadValue, match="no rows"):
        plots.effects([])


# ---------------------------------------------------------------- histograms


def shares(figure: Figure) -> list[np.ndarray]:
    """The outline of each set."""
    return [patch.get_data().values for patch in figure.axes[0].patches if not patch.get_fill()]


def edges(figure: Figure) -> np.ndarray:
    return figure.axes[0].patches[0].get_data().edges


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_histograms_write_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"p.{suffix}"
    figure = plots.histograms({"$a_1$": [1.0, 2.0], "_b\n": [5.0]}, path, title="$\\broken{$")
    assert path.stat().st_size > 1000
    assert list(tmp_path.iterdir()) == [path]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["$a_1$ (2)", "_b· (1)"]
    with pytest.raises(BadValue, match=r"suffix '\.jpg'"):
        plots.histograms({"a": [1.0]}, tmp_path / "p.jpg")


def test_sets_share_bins_and_are_shares_of_themselves() -> None:
    rng = np.random.default_rng(0)
    sets = {"in": rng.normal(5, 1, 1000), "out": rng.normal(9, 2, 30)}
    figure = plots.histograms(sets)
    assert figure.axes[0].get_xscale() == "linear"
    for drawn, values in zip(shares(figure), sets.values(), strict=True):
        assert drawn.sum() == pytest.approx(1)
        assert np.array_equal(drawn, np.histogram(values, edges(figure))[0] / len(values))
    both = np.concatenate(list(sets.values()))
    assert (edges(figure)[0], edges(figure)[-1]) == (both.min(), both.max())
    colours = [to_hex(patch.get_edgecolor()) for patch in figure.axes[0].patches if not patch.get_fill()]
    assert colours == [style.FIRST, style.SECOND]
    assert pixels(figure).std() > 1


@pytest.mark.parametrize("sizes", [(1000, 1000), (1000, 3), (3, 1000)])
def test_far_scores_do_not_squeeze_the_others(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    sets = {"in": rng.gamma(3, 1, sizes[0]), "out": rng.gamma(3, 1000, sizes[1])}
    figure = plots.histograms(sets)
    assert figure.axes[0].get_xscale() == "asinh"
    pixels(figure)
    widths = np.diff(edges(figure))
    assert 1 <= (widths[1:] / widths[:-1]).max() < 1.5, "a jump in the width of bins looks like a peak"
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert len(boxes) >= 3
    assert all(left.x1 <= right.x0 + 1 for left, right in itertools.pairwise(sorted(boxes, key=lambda box: box.x0)))
    inner, outer = shares(figure)
    assert outer.sum() == inner.sum() == pytest.approx(1)
    assert (inner > 0).sum() >= min(12, sizes[0]), "one bin for all"
    assert not (inner * outer).any()
    assert (widths > 0).all()


def test_what_is_not_finite_is_said() -> None:
    figure = plots.histograms({"in": [1.0, 2.0], "out": [3.0, np.inf, np.nan], "gone": [np.inf]})
    assert notes(figure) == ["not finite, and not shown: 2 of out, 1 of gone"]
    assert [drawn.sum() for drawn in shares(figure)] == pytest.approx([1, 1 / 3, 0])
    pixels(figure)
    assert notes(plots.histograms({"in": [1.0]})) == []


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-300, 1e300, np.inf])
def test_constant_scores(value: float) -> None:
    figure = plots.histograms({"a": [value] * 3})
    pixels(figure)
    assert shares(figure)[0].sum() == np.isfinite(value)


def test_negative_scores_far_below() -> None:
    figure = plots.histograms({"a": np.linspace(-1, 1, 50), "b": np.linspace(-5000, -4000, 50)})
    pixels(figure)
    assert (edges(figure)[0], edges(figure)[-1]) == (-5000, 1)
    assert [drawn.sum() for drawn in shares(figure)] == pytest.approx([1, 1])


def test_the_ends_of_the_numbers() -> None:
    figure = plots.histograms({"a": np.zeros(5), "b": np.arange(5) * 1e-320, "c": [1e308, -1e308], "d": [1.0, 2.0]})
    pixels(figure)
    assert [drawn.sum() for drawn in shares(figure)] == pytest.approx([1, 1, 1, 1])
    pixels(plots.histograms({"a": [1e-90, 2e-90], "b": [1e308, -1e308]}))


def test_bad_sets() -> None:
    with pytest.raises(BadValue, match=r"0 sets of scores\. Expected one to 6\. Pass"):
        plots.histograms({})
    with pytest.raises(BadValue, match=r"7 sets of scores\. Expected one to 6"):
        plots.histograms({str(i): [1.0] for i in range(7)})
    for scores, shape in (([], r"\(0,\)"), ([[1.0]], r"\(1, 1\)"), (1.0, r"\(\)")):
        with pytest.raises(BadValue, match=rf"The scores of 'out' have shape {shape}\. Expected \[N\]"):
            plots.histograms({"in": [1.0], "out": scores})


# ---------------------------------------------------------------- no global state


@pytest.mark.slow
def test_pyplot_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, matplotlib\n"
        "before = matplotlib.rcParams.copy()  # dict() would choose a backend, with pyplot\n"
        "from noesis import plots\n"
        f"plots.heat_map(np.ones((2, 2)), 'ab', 'cd', title='t', path={str(tmp_path / 'p.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.rcParams.copy() == before\n"
    )
    done = python("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr


def test_the_style_of_the_session_changes_no_names_and_no_colours() -> None:
    plain = draw("effects", ["a", "$b$", "_c"])
    with rc_context({"axes.facecolor": "black", "figure.facecolor": "black", "axes.grid": True, "text.color": "white"}):
        styled = draw("effects", ["a", "$b$", "_c"])
        assert np.array_equal(pixels(plain), pixels(styled))


def test_drawing_in_threads() -> None:
    drawn = in_threads(4, lambda _: pixels(draw("bars", ["a", "b"])).size)
    assert len(set(drawn)) == 1


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"plots needs .*'matplotlib'.*the extra 'viz'.*noesis\[viz\]"):
        plots.bars([soulprint(["a"])])
