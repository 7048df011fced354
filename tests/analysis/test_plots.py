"""The pictures show the numbers that they are given: colours, places, labels and files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
matplotlib = pytest.importorskip("matplotlib")

from lora_kernels.analysis.drawing import number, short, ticks  # noqa: E402
from lora_kernels.analysis.plots import plot_layers, plot_similarity, plot_spectra  # noqa: E402

LOW, MIDDLE, HIGH = ([round(255 * c) for c in matplotlib.colormaps["viridis"](v)[:3]] for v in (0.0, 0.5, 1.0))


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.round(255 * imread(path)[..., :3]).astype(int)


def places(picture: np.ndarray, colour: list[int]) -> tuple[float, float]:
    """Return the mean row and column, as parts of the picture, of the pixels that are of this colour."""
    rows, columns = np.nonzero((abs(picture - np.array(colour)) <= 2).all(-1))
    assert len(rows) > 50, f"no {colour}"
    return rows.mean() / picture.shape[0], columns.mean() / picture.shape[1]


def texts(path: Path) -> str:
    """Return a picture in SVG, in which every text stands in a comment beside its outlines."""
    return path.read_text(encoding="utf-8")


def test_phi_has_i_downwards_and_j_to_the_right(tmp_path):
    plot_similarity({"q": [[0.0, 0.0], [0.5, 1.0]]}, tmp_path / "phi.png", dpi=80)
    picture = pixels(tmp_path / "phi.png")
    map_only = picture[:, : int(0.7 * picture.shape[1])]  # without the colour bar
    row, column = places(map_only, HIGH)
    assert row > places(map_only, LOW)[0] and column > places(map_only, MIDDLE)[1]
    assert places(map_only, MIDDLE)[0] == pytest.approx(row, abs=0.02)


def test_colours_of_phi_are_from_0_to_1_whatever_the_values_are(tmp_path):
    for value, colour in ((0.0, LOW), (0.5, MIDDLE), (1.0, HIGH)):
        plot_similarity({"q": torch.full((3, 4), value)}, tmp_path / "phi.png", dpi=80)
        picture = pixels(tmp_path / "phi.png")
        places(picture[:, : int(0.7 * picture.shape[1])], colour)


def test_what_has_no_value_is_hatched(tmp_path):
    plot_similarity({"q": [[1.0, math.nan], [math.nan, math.nan]]}, tmp_path / "phi.png", dpi=80)
    plot_layers([[1.0], [math.nan]], tmp_path / "map.png", blocks=["0", "1"], modules=["q"], label="rank")
    for name in ("phi.png", "map.png"):
        places(pixels(tmp_path / name), [0xEE] * 3)


def test_the_random_panel_stands_last_and_every_panel_has_its_title(tmp_path):
    phi = np.ones((8, 64))
    plot_similarity(
        {"q_proj": phi, "v_proj": phi / 2}, tmp_path / "phi.svg", random=phi * 0.1, rows="i, of a", columns="j, of b"
    )
    made = texts(tmp_path / "phi.svg")
    order = [made.index(f"<!-- {text} -->") for text in ("q_proj", "v_proj", "random (expected)", "φ(i, j)")]
    assert order == sorted(order) and "<!-- i, of a -->" in made and made.count("<!-- j, of b -->") == 3
    assert "<!-- 64 -->" in made and "<!-- 1 -->" in made and "<!-- 0 -->" not in made


@pytest.mark.parametrize(
    ("n", "most", "wanted"),
    [
        (1, 9, [1]),
        (2, 9, [1, 2]),
        (8, 9, [1, 2, 3, 4, 5, 6, 7, 8]),
        (8, 5, [1, 2, 4, 6, 8]),
        (12, 9, [1, 2, 4, 6, 8, 10, 12]),
        (64, 9, [1, 8, 16, 24, 32, 40, 48, 56, 64]),
        (256, 9, [1, 32, 64, 96, 128, 160, 192, 224, 256]),
    ],
)
def test_ticks_begin_at_1_and_are_few(n, most, wanted):
    assert ticks(n, most) == wanted


def test_spectra_of_few_layers_have_names_and_effective_ranks(tmp_path):
    spectra = {"layers.0.q": [3.0, 1.0, 0.0], "layers.0.v": torch.tensor([2.0, 1.0, 0.5]), "untrained": [0.0, 0.0, 0.0]}
    plot_spectra(spectra, tmp_path / "s.svg", effective={"layers.0.q": 1.5}, title="Spectra")
    made = texts(tmp_path / "s.svg")
    for text in ("layers.0.q", "layers.0.v", "untrained (zero)", "effective rank", "Spectra"):
        assert f"<!-- {text} -->" in made
    assert "{-1" in made and "{-13" not in made and "{-3" not in made  # the zeros do not stretch the axis


def test_rounding_that_is_left_of_a_zero_is_left_out(tmp_path):
    plot_spectra({"q": [1.0, 0.1, 1e-17]}, tmp_path / "one.svg")
    plot_spectra({"q": [1.0, 0.1, 0.0]}, tmp_path / "other.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()


def test_spectra_of_many_layers_have_the_colours_of_their_groups(tmp_path):
    groups = {f"layers.{i}.{module}": module for i in range(8) for module in ("q_proj", "v_proj")}
    spectra = {name: [2.0 - 0.1 * i, 1.0, 0.3] for i, name in enumerate(groups)}
    plot_spectra(spectra, tmp_path / "s.svg", groups=groups, effective=dict.fromkeys(groups, 2.0))
    made = texts(tmp_path / "s.svg")
    assert "<!-- q_proj (8) -->" in made and "<!-- v_proj (8) -->" in made and "effective rank" not in made
    plot_spectra(spectra, tmp_path / "order.svg")
    made = texts(tmp_path / "order.svg")
    assert "<!-- layers.0.q_proj -->" in made and "<!-- layers.7.v_proj -->" in made and "layers.3" not in made


@pytest.mark.parametrize("spectra", [{"q": [0.5]}, {"q": [0.0]}, {"q": []}, {f"q{i}": [0.1 * i] for i in range(12)}])
def test_spectra_of_one_value_or_none_are_drawn(spectra, tmp_path):
    plot_spectra(spectra, tmp_path / "s.svg")
    assert ("every update is zero" in texts(tmp_path / "s.svg")) == (not any(map(any, spectra.values())))


def test_a_map_has_blocks_to_the_right_and_modules_downwards(tmp_path):
    values = [[0.0, 0.5], [0.0, 1.0]]
    plot_layers(values, tmp_path / "map.png", blocks=["0", "1"], modules=["q", "v"], label="rank", dpi=80)
    picture = pixels(tmp_path / "map.png")
    cells = picture[:, : int(0.68 * picture.shape[1])]
    row, column = places(cells, HIGH)
    assert row > places(cells, LOW)[0] and column > places(cells, MIDDLE)[1]


def test_cells_have_numbers_where_there_is_room(tmp_path):
    few = [[0.032, 26.4], [math.inf, math.nan]]
    plot_layers(few, tmp_path / "few.svg", blocks=["0", "1"], modules=["q", "v"], label="‖ΔW‖ / ‖W‖", title="Norms")
    made = texts(tmp_path / "few.svg")
    for text in ("0.0320", "26.4", "∞", "‖ΔW‖ / ‖W‖", "Norms", "q", "v"):
        assert f"<!-- {text} -->" in made
    many = np.linspace(0.1234, 0.9, 80 * 8).reshape(80, 8)
    plot_layers(many, tmp_path / "many.svg", blocks=list(map(str, range(80))), modules=list("abcdefgh"), label="φ")
    assert "<!-- 0.12" not in texts(tmp_path / "many.svg") and "<!-- 78 -->" in texts(tmp_path / "many.svg")


@pytest.mark.parametrize("value", [0.0, 3.0, math.nan])
def test_a_map_of_one_number_is_drawn(value, tmp_path):
    plot_layers([[value]], tmp_path / "map.svg", blocks=["encoder"], modules=["q"], label="rank")
    assert "<!-- encoder -->" in texts(tmp_path / "map.svg")


def test_a_reference_is_marked_and_limits_make_the_scale_linear(tmp_path):
    values = [[0.001], [0.9]]
    how = {"blocks": ["0", "1"], "modules": ["q"], "label": "φ"}
    plot_layers(values, tmp_path / "log.svg", **how)
    plot_layers(values, tmp_path / "linear.svg", limits=(0.0, 1.0), reference=0.5, **how)
    log, linear = texts(tmp_path / "log.svg"), texts(tmp_path / "linear.svg")
    assert "^{-2}" in log and "^{-2}" not in linear and "<!-- 1.0 -->" in linear
    assert "<!-- φ (orange line: 0.50) -->" in linear and "<!-- φ -->" in log
    assert "#d55e00" in linear and "#d55e00" not in log


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_equal_pictures_are_equal_files_and_the_settings_of_matplotlib_stay(suffix, tmp_path):
    before = dict(matplotlib.rcParams)
    for name in ("one", "other"):
        plot_layers([[1.0, 2.0]], tmp_path / f"{name}.{suffix}", blocks=["0"], modules=["q", "v"], label="rank")
    content = (tmp_path / f"one.{suffix}").read_bytes()
    assert content == (tmp_path / f"other.{suffix}").read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    assert dict(matplotlib.rcParams) == before and b"/Type3" not in content
    assert sorted(path.suffix for path in tmp_path.iterdir() if not path.name.startswith(".")) == [f".{suffix}"] * 2


def test_a_name_is_no_formula_and_a_long_one_keeps_its_end(tmp_path):
    plot_spectra({"a$b$_c": [1.0], "x" * 60 + ".q_proj": [1.0]}, tmp_path / "s.svg")
    assert short("abc.def", 4) == "…def" and short("a$b") == r"a\$b"


@pytest.mark.parametrize(
    ("value", "two", "three"),
    [
        (0.0, "0", "0"),
        (1.44, "1.4", "1.44"),
        (2.0, "2", "2"),
        (5.97, "6.0", "5.97"),
        (9.99, "10", "9.99"),
        (26.4, "26", "26.4"),
        (99.97, "100", "100"),
        (1234.5, "1234", "1234"),
        (0.0321, "0.032", "0.0321"),
        (3e-5, "3e-05", "3e-05"),
        (np.inf, "∞", "∞"),
    ],
)
def test_a_number_has_few_characters(value, two, three):
    assert (number(value), number(value, 3)) == (two, three)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda to: plot_similarity({}, to / "a.png"), "one or more arrays"),
        (lambda to: plot_similarity({"q": np.ones((2, 3)), "v": np.ones((3, 2))}, to / "a.png"), r"\(3, 2\)"),
        (lambda to: plot_similarity({"q": np.ones((2, 3))}, to / "a.png", random=np.ones((2, 2))), r"\(2, 2\)"),
        (lambda to: plot_similarity({"q": np.ones(3)}, to / "a.png"), r"panel 'q' must have two dimensions, got \[3\]"),
        (lambda to: plot_spectra({}, to / "a.png"), "no spectra"),
        (lambda to: plot_spectra({"a": [1.0]}, to / "a.png", groups={"b": "q"}), "no group for a"),
        (
            lambda to: plot_layers(np.ones((2, 3)), to / "a.png", blocks=["0"], modules=["q"], label=""),
            r"\[1, 1\], at least 1 × 1, got \[2, 3\]",
        ),
        (lambda to: plot_spectra({"a": [1.0]}, to / "a.docx"), r"a\.docx: the suffix must be .* pdf, .* png"),
        (lambda to: plot_spectra({"a": [1.0]}, to / "a"), "the suffix must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir())
