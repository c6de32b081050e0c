"""Build the small world from nothing: python training/build.py [--short] [--from STAGE]

Stages run one after the other, each resumable; a stage that is finished is passed over. --short takes a few steps of everything
and writes to training/runs/short, to show that the chain holds.
"""
import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAGES = {   # stage: commands that run side by side, one thread each if there are two
    "data": [["data.py"]], "vae": [["vae.py"]], "base": [["base.py", "0", "2"], ["base.py", "1", "2"]], "loras": [["loras.py", "subjects"], ["loras.py", "styles"]],
    "encoders": [["encoders.py", "probe"], ["encoders.py", "judge"]], "floors": [["floors.py"]], "export": [["export.py"]],
}


def short_run():
    """Environment of a short run: its own fresh folder, but the npm packages and drawings already there."""
    home = HERE / "runs" / "short"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    for name in ("npm", "drawings"):
        if (HERE / "runs" / name).exists() and not (home / name).exists():
            (home / name).symlink_to(HERE / "runs" / name)
    return dict(LORAMIX_SHORT="1", LORAMIX_RUNS=str(home), LORAMIX_OUT=str(home / "data"), LORAMIX_NOTES=str(home / "notes"))


def run(stage, commands, environment):
    """Run a stage's commands at once; stop the build if one fails."""
    runs = Path(environment.get("LORAMIX_RUNS", HERE / "runs"))
    done = runs / "done" / stage
    if done.exists():
        return print(f"{stage}: done before")
    begun = time.time()
    environment = environment | dict(OMP_NUM_THREADS=str(2 // len(commands)))
    running = [subprocess.Popen([sys.executable, str(HERE / command[0]), *command[1:]], env=os.environ | environment) for command in commands]
    if any([process.wait() for process in running]):
        sys.exit(f"{stage} failed")
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(f"{time.time() - begun:.0f} seconds\n")
    print(f"{stage}: {time.time() - begun:.0f} seconds", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few steps of every stage")
    parser.add_argument("--from", dest="first", choices=STAGES, default="data", help="begin at this stage")
    arguments = parser.parse_args()
    environment = short_run() if arguments.short else {}
    stages = list(STAGES)
    for stage in stages[stages.index(arguments.first):]:
        run(stage, STAGES[stage], environment)


if __name__ == "__main__":
    main()
