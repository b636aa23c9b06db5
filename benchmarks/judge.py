"""What `diffusion-evaluate` says of images, for benchmarks: FD beside its floor."""
import json
import subprocess
import sys
from pathlib import Path


def judge(
    folder: Path,  # the report goes to FOLDER/judged
    eyes: tuple,   # names of feature networks
    *words: str,   # of the command: what is judged, and how
) -> dict[str, dict[str, float]]:  # network -> fd, floor, and ratio of the two
    "FD through each network. Raises CalledProcessError where the command fails; it says why."
    code = "import sys; from diffusion_model.cli import evaluate_command as c; sys.exit(c())"
    subprocess.run([sys.executable, "-c", code, "--metrics", "fd", "--features", ",".join(eyes),
                    "--output_dir", str(folder/"judged"), *words],
                   check=True, stdout=subprocess.DEVNULL)
    report = json.loads((folder/"judged"/"report.json").read_text())
    return {line["eye"].split("@")[0]: {"fd": line["value"], "floor": line["floor"]["mean"],
                                        "ratio": line["ratio"]}
            for line in report["results"] if line["metric"] == "fd"}
