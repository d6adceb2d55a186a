"""Virtual environments of the systems that lmppo is compared with, each with packages of its own."""

import subprocess
import sys
from pathlib import Path

# trl 0.11.4 is the last release with the PPOTrainer that has `step`; trl 1.12.0 the last one with trl.experimental.ppo;
# trl 1.16.0 is the one in constraints.txt.
REQUIREMENTS = {
    "trl_classic": [
        "torch==2.13.0",
        "trl==0.11.4",
        "transformers==4.45.2",
        "accelerate==0.34.2",
        "datasets<3.2",
        "numpy<2",
        "pandas<2.3",
        "pyarrow<19",
        "tokenizers<0.21",
        "rich",
        "vaderSentiment==3.3.2",
    ],
    "trl_experimental": [
        "torch==2.13.0",
        "trl==1.12.0",
        "transformers==5.23.0",
        "accelerate==1.15.0",
        "peft==0.21.2",
        "datasets==5.2.0",
        "vaderSentiment==3.3.2",
    ],
    "trl_current": [
        "torch==2.13.0",
        "trl==1.16.0",
        "transformers==5.23.0",
        "accelerate==1.15.0",
        "datasets==5.2.0",
        "vaderSentiment==3.3.2",
    ],
}


def python_of(system: str, folder: Path) -> Path | str:
    """The interpreter that runs a system; its environment is made in ``folder`` unless it is there already.

    Raises:
        subprocess.CalledProcessError: A package cannot be installed.
    """
    if system == "lmppo":
        return sys.executable
    place, requirements = folder / system, REQUIREMENTS[system]
    python, installed = place / "bin" / "python", place / "installed.txt"
    if not installed.exists() or installed.read_text().splitlines() != requirements:
        print(f"Making {place} for {system}.", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True)
        installed.write_text("\n".join(requirements) + "\n")
    return python
