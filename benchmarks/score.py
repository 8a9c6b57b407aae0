r"""How long scoring takes and how much memory it needs, without neural parts, for several numbers of reports.

    python benchmarks/score.py --num_pairs 2500 10000

Reports are made up of clauses so that nearly all differ (34 words on average), which is the worst case: equal pairs are
computed once. Prints for each number wall seconds, CPU seconds of all its processes and the peak memory of the largest,
of one run of evaluation/score.py, alone and beside its baselines (with --train_json).
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from jsonargparse.typing import PositiveInt

from command_line import DONE, make_parser, run

ROOT = Path(__file__).resolve().parent.parent
ORGANS = [
    "Breast, biopsy",
    "Prostate, biopsy",
    "Stomach, endoscopic biopsy",
    "Lung, biopsy",
    "Colon, colonoscopic biopsy",
]
FINDINGS = ["Adenocarcinoma, moderately "
    "differentiated", "No tumor present", "Chronic gastritis", "Squamous cell carcinoma",
            "Acinar adenocarcinoma, Gleason's score 7 (3+4), grade group 2, tumor volume: {}%", "Tubular adenoma",
            "Invasive carcinoma of no special type, grade II (Tubule formation: 3, Nuclear grade: 2, "
                "Mitoses: 1)"]  # fmt: skip
CLAUSES = ["with focal necrosis", "with involvement of muscle proper", "arising in an adenoma",
           "{} mm in greatest extent",
           "margins are free by {} mm", "no lymphovascular invasion", "the stroma shows chronic inflammation",
           "with intestinal metaplasia", "in {} of {} cores", "with high grade dysplasia"]  # fmt: skip


# Runs a command and waits for it and for the worker processes that outlive their parent, which Linux hands to us.
PR_SET_CHILD_SUBREAPER = 36
MEASURED = f"""
import ctypes, json, os, resource, subprocess, sys, time
if sys.platform == "linux":
    ctypes.CDLL(None).prctl({PR_SET_CHILD_SUBREAPER}, 1, 0, 0, 0)
began = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
wall = time.perf_counter() - began
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, wall, used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--num_pairs", type=PositiveInt, nargs="+", default=[2500, 5000, 10_000], help="reports scored")
    args = parser.parse_args()
    print(f"{'pairs':>8}{'baselines':>11}{'wall s':>9}{'CPU s':>8}{'peak MiB':>10}")
    for num_pairs in args.num_pairs:
        for with_train in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                wall, cpu, peak = measure(Path(folder), num_pairs, with_train)
            print(f"{num_pairs:>8}{'yes' if with_train else 'no':>11}{wall:>9.1f}{cpu:>8.1f}{peak:>10.0f}", flush=True)
    return DONE


def measure(folder: Path, num_pairs: int, with_train: bool) -> tuple[float, float, float]:
    """Wall and CPU seconds and peak resident MiB of one run of the command."""
    rng = random.Random(0)
    flags = []
    for name in ("predictions", "references", "train_json")[: 2 + with_train]:
        rows = [{"id": f"slide_{i}", "report": report(rng)} for i in range(num_pairs)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
        flags += [f"--{name}", str(folder / f"{name}.json")]
    command = [sys.executable, "evaluation/score.py", *flags, "--output_dir", str(folder / "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    status, wall, cpu, peak = json.loads(done.stdout)
    if status != DONE:
        raise ValueError(f"evaluation/score.py left with exit status {status}")
    return wall, cpu, peak / (1024 if sys.platform != "darwin" else 1024**2)


def report(rng: random.Random) -> str:
    """One made-up report."""
    findings = [
        f"{rng.choice(FINDINGS)}, {', '.join(rng.choice(CLAUSES) for _ in range(rng.randint(2, 5)))}"
        for _ in range(rng.randint(1, 2))
    ]
    text = f"{rng.choice(ORGANS)};\n  " + "\n  ".join(f"{i}. {finding}" for i, finding in enumerate(findings, 1))
    while "{}" in text:
        text = text.replace("{}", str(rng.randint(1, 99)), 1)
    return text


if __name__ == "__main__":
    run(main, to_go_on="run it again")
