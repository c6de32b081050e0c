"""What `import loramix` and `loramix --help` take over bare Python, in seconds: the best of five processes each, since other work shares the machine. The bar is 0.3 s over bare Python, for both.

    python benchmarks/import_time.py"""
import subprocess, sys, time

JOBS = {"bare Python": "pass", "import loramix": "import loramix", "loramix --help": "from loramix.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"}


def seconds(code):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return time.perf_counter() - start


best = {name: min(seconds(code) for _ in range(5)) for name, code in JOBS.items()}
for name, value in best.items(): print(f"{name:15} {value:.3f} s, {value - best['bare Python']:.3f} over bare")
