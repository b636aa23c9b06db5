"""Draw the site's small picture (favicon.png) and the one that is shown with links (social.png).

    python tests/site_images.py    # writes nbs/images/
"""
from pathlib import Path

import matplotlib
import torch
from PIL import Image

from diffusion_model.counters import counter_normal
from diffusion_model.dataset import draw_shapes
from diffusion_model.plotting import image_grid
from diffusion_model.scheduler import FlowSchedule

matplotlib.use("Agg")
FOLDER = Path(__file__).resolve().parent.parent/"nbs"/"images"


def favicon(folder: Path = FOLDER) -> None:
    "A figure that the library draws, 32 × 32, in 64 × 64 pixels."
    pixels = image_grid(draw_shapes(1, torch.tensor([5]), 32)[0], pad=0)
    Image.fromarray(pixels).resize((64, 64), Image.NEAREST).save(folder/"favicon.png")


def social(folder: Path = FOLDER) -> None:
    "Figures on their way from noise to image, and the project's name: 1200 × 630 pixels."
    import matplotlib.pyplot as plt
    figures = draw_shapes(1, torch.arange(3), 32)[0]/127.5 - 1
    noise = counter_normal(0, "social", torch.arange(3), (3, 32, 32))
    times = torch.tensor([1., 0.85, 0.7, 0.5, 0.3, 0.])
    frames = [FlowSchedule().add_noise(figures, noise, t) for t in times]
    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor="white")
    for row in range(3):
        for column, frame in enumerate(frames):
            ax = fig.add_axes([0.04 + column*0.155, 0.04 + (2 - row)*0.245, 0.145, 0.235])
            ax.imshow(((frame[row] + 1)/2).clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
            ax.axis("off")
    fig.text(0.04, 0.86, "diffusion_model", size=44, weight="bold")
    fig.text(0.52, 0.86, "from noise to image, in notebooks", size=22, color="0.35")
    fig.savefig(folder/"social.png")


if __name__ == "__main__":
    favicon()
    social()
