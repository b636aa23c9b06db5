"`python -m diffusion_model.train`: `diffusion-train`, for launchers that start a module."
from diffusion_model.cli import train_command

if __name__ == "__main__": raise SystemExit(train_command())
