"Grids, films and curves: pixels, shapes, files, and what must hold without a screen."
import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from diffusion_model.plotting import (
    COLOURS, explore, image_grid, plot_curves, plot_metrics, save_film, save_grid, save_image,
    setup_plots, show_images, show_strip, smooth)


@pytest.fixture(autouse=True)
def no_figures_left():
    with matplotlib.rc_context():
        yield
    plt.close("all")


# ---------------------------------------------------------------------------- grids

@pytest.mark.parametrize("value, byte", [(-9., 0), (-1., 0), (0., 128), (1., 255), (9., 255)])
def test_floats_are_clamped_never_stretched(value, byte):
    assert (image_grid(torch.full((1, 3, 2, 2), value), pad=0) == byte).all()


def test_every_byte_survives_the_way_to_floats_and_back():
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = bytes_.float()/127.5 - 1
    for x in (bytes_, floats, floats.double(), floats.numpy()):
        assert (image_grid(x, pad=0)[..., 0].ravel() == np.arange(256)).all()


@pytest.mark.parametrize("n, ncol, shape", [(1, None, (1, 1)), (5, None, (2, 3)), (9, None, (3, 3)),
                                            (5, 2, (3, 2)), (3, 8, (1, 3)), (7, 1, (7, 1))])
def test_rows_and_columns(n, ncol, shape):
    grid = image_grid(torch.zeros(n, 1, 4, 6), ncol, pad=2)
    assert grid.shape == (shape[0]*6 + 2, shape[1]*8 + 2, 3) and grid.dtype == np.uint8


def test_images_lie_row_by_row_on_white():
    grid = image_grid(torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2),
                      ncol=3, pad=1)
    assert grid[1::3, 1::3, 0][:2, :3].tolist() == [[1, 2, 3], [4, 5, 255]]
    assert (grid[0] == 255).all() and (grid[:, 0] == 255).all() and (grid[3] == 255).all()


def test_channels_keep_their_order():
    x = torch.tensor([1., 0., -1.]).view(1, 3, 1, 1)
    assert image_grid(x, pad=0)[0, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize("channels, seen", [(2, [0, 0, 0]), (4, [0, 1, 2]), (7, [0, 1, 2])])
def test_of_other_channels_three_are_shown(channels, seen):
    x = torch.arange(channels, dtype=torch.uint8).view(1, channels, 1, 1)
    assert image_grid(x, pad=0)[0, 0].tolist() == seen


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_one_image_in_a_file(channels, tmp_path):
    x = torch.randint(0, 256, (channels, 4, 6), dtype=torch.uint8)
    path = save_image(x, tmp_path/"00001.png")
    assert path.name == ("00001.npy" if channels == 5 else "00001.png")
    back = np.load(path) if channels == 5 else np.asarray(Image.open(path))
    if channels in (2, 3, 4): back = back.transpose(2, 0, 1)
    assert (back.reshape(x.shape) == x.numpy()).all()
    with pytest.raises(ValueError, match="image: found float32"):
        save_image(x.float(), tmp_path/"x")


def test_a_single_image_and_a_tensor_with_gradient():
    x = torch.zeros(3, 4, 4, requires_grad=True)
    assert image_grid(x, pad=0).shape == (4, 4, 3)


# ---------------------------------------------------------------------------- files

def test_saved_grid_is_the_grid(tmp_path):
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))*2 - 1
    path = save_grid(x, tmp_path/"grid.png", ncol=3, scale=2)
    big = np.asarray(Image.open(path))
    assert (big == image_grid(x, 3).repeat(2, 0).repeat(2, 1)).all()


def test_film_has_all_frames_and_holds_the_last(tmp_path):
    frames = [torch.full((4, 1, 8, 8), v) for v in torch.linspace(-1, 1, 5)]
    film = Image.open(save_film(frames, tmp_path/"film.gif", fps=10, hold=1.5))
    assert film.n_frames == 5 and film.info["loop"] == 0
    times, middles = [], []
    for k in range(5):
        film.seek(k)
        times.append(film.info["duration"])
        middles.append(np.asarray(film.convert("L"))[5, 5])
    assert times == [100]*4 + [1500]
    assert middles[0] == 0 and middles[-1] == 255 and middles == sorted(middles)


def test_film_of_one_frame(tmp_path):
    assert Image.open(save_film([torch.zeros(1, 1, 4, 4)], tmp_path/"one.gif")).n_frames == 1


# ---------------------------------------------------------------------------- figures

def test_show_images_gives_each_its_title():
    fig = show_images(torch.zeros(5, 1, 4, 4), titles=range(5), ncol=3, title="five")
    assert [ax.get_title() for ax in fig.axes] == ["0", "1", "2", "3", "4", ""]
    assert sum(len(ax.images) for ax in fig.axes) == 5


def test_strip_has_a_column_for_each_frame():
    fig = show_strip([torch.zeros(3, 1, 4, 4)]*4, titles="abcd")
    assert [ax.get_title() for ax in fig.axes] == list("abcd")
    assert fig.axes[0].images[0].get_array().shape == (3*5 + 1, 6, 3)


def test_curves_are_named_and_labelled():
    ax = plot_curves({"a": ([1, 2], [3, 4]), "b": ([1, 2], [5, 6])}, "step", "loss", log="xy")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]


@pytest.mark.parametrize("beta", [0., 0.5, 0.98])
def test_smooth_is_the_explicit_weighted_sum(beta):
    values = np.random.default_rng(0).normal(size=40)
    weights = [beta**np.arange(n, -1, -1, dtype=float) for n in range(40)]
    expected = [w @ values[:len(w)]/w.sum() for w in weights]
    assert np.allclose(smooth(values, beta), expected, atol=1e-12, rtol=0)
    assert len(smooth([], beta)) == 0


# ---------------------------------------------------------------------------- a run's loss.png

METRICS = [{"step": k, "loss": 1/k, "lr": 1e-4, **({"validation_loss": 0.1} if k % 5 == 0 else {})}
           for k in range(1, 21)]


def test_loss_curve_leaves_no_global_figure(tmp_path):
    plot_metrics(METRICS, tmp_path/"loss.png")
    assert plt.get_fignums() == []
    with Image.open(tmp_path/"loss.png") as image: assert image.size[0] > 300


@pytest.mark.parametrize("metrics", [
    [], METRICS[:1], [{"step": 1, "validation_loss": 0.5}], [{"step": 1, "loss": math.nan}],
    [*METRICS, {"step": 21, "loss": None}, {"step": 22, "loss": math.inf}]])
def test_loss_curve_of_an_odd_run(metrics, tmp_path):
    plot_metrics(metrics, tmp_path/"loss.png")
    assert (tmp_path/"loss.png").stat().st_size > 1000


def test_loss_curve_off_the_main_thread(tmp_path):
    from threading import Thread
    thread = Thread(target=plot_metrics, args=(METRICS, tmp_path/"loss.png"))
    thread.start()
    thread.join()
    assert (tmp_path/"loss.png").exists()


# --------------------------------------------------------------------- explore, style, import

def test_explore_without_a_kernel_is_a_strip_from_first_to_last(monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    drawn = []
    explore(lambda ax, t: drawn.append((type(ax).__name__, t)), frames=3, t=list(range(11)))
    assert drawn == [("Axes", 0), ("Axes", 5), ("Axes", 10)]
    assert [ax.get_title() for ax in plt.gcf().axes] == ["t = 0", "t = 5", "t = 10"]


def test_explore_without_ipython_varies_the_first_parameter_that_can_vary(monkeypatch):
    monkeypatch.delenv("IN_TEST", raising=False)
    drawn = []
    explore(lambda ax, a, b, c: drawn.append((a, b, c)), frames=3, a=[0.5], b=["x", "y"],
            c=[1, 2, 3], start={"c": 3})
    assert drawn == [(0.5, "x", 3), (0.5, "y", 3)]
    assert [ax.get_title() for ax in plt.gcf().axes] == ["b = x", "b = y"]
    assert plt.gcf().get_suptitle() == "a = 0.5, c = 3"


@pytest.mark.parametrize("values, others", [
    ({"t": [0, 1], "k": ["a", "b", "c"], "n": [1, 2, 4, 8, 16]}, {"k": "a", "n": 4}),
    ({"t": [0, 1], "k": ["b", "a", "b"], "on": [True, False]}, {"k": "b", "on": True}),
    ({"t": [0, 1], "w": np.linspace(0, 1, 3)}, {"w": 0.5})])
def test_explore_begins_in_the_middle_of_numbers_and_at_the_first_name(values, others, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    drawn = []
    explore(lambda ax, **chosen: drawn.append(chosen), **values)
    assert drawn == [{"t": 0, **others}, {"t": 1, **others}]


@pytest.mark.parametrize("start", [{"t": 3}, {"other": 1}])
def test_explore_refuses_to_begin_where_no_value_is(start):
    with pytest.raises(ValueError, match="one of the values that are listed"):
        explore(lambda ax, t: None, t=[1, 2], start=start)


def test_explore_with_a_kernel_has_a_control_for_each_parameter(monkeypatch):
    import nbformat
    from nbclient import NotebookClient
    monkeypatch.delenv("IN_TEST", raising=False)
    code = ("from diffusion_model.plotting import explore\n"
            "explore(lambda ax, **chosen: print(chosen), solver=['ddim', 'heun'],\n"
            "        a_rather_long_name=[0., 0.1 + 0.2, 1., 2.], start={'solver': 'heun'})")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    shown, = book.cells[0].outputs
    assert "application/vnd.jupyter.widget-view+json" in shown.data
    state = book.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    kinds = {w["model_name"]: w["state"] for w in state.values()}
    names, numbers = kinds["DropdownModel"], kinds["SelectionSliderModel"]
    assert names["description"] == "solver" and names["_options_labels"] == ["ddim", "heun"]
    assert names["index"] == 1 and numbers["index"] == 2
    assert numbers["_options_labels"] == ["0", "0.3", "1", "2"]
    styles = [w["state"] for w in state.values() if w["state"].get("description_width")]
    assert len(styles) == 2 and {s["description_width"] for s in styles} == {"initial"}
    drawn, = (w["state"]["outputs"] for w in state.values() if w["model_name"] == "OutputModel")
    assert "{'solver': 'heun', 'a_rather_long_name': 1.0}" in drawn[0]["text"]  # drawn at once


def test_style_is_plain_and_small():
    setup_plots()
    params = matplotlib.rcParams
    assert params["figure.dpi"] == params["savefig.dpi"] == 80
    assert not params["axes.spines.top"] and not params["axes.spines.right"]
    assert params["axes.prop_cycle"].by_key()["color"] == COLOURS
    assert len(set(COLOURS)) == len(COLOURS)


def test_import_is_light():
    code = ("import sys, diffusion_model.plotting; "
            "print([m for m in ('torch', 'matplotlib', 'PIL', 'IPython') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
