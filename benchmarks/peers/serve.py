"""What the peers' scripts share: measure one slide whenever the benchmark asks. Needs the standard library only.

A line of stdin names a slide; the answer is a line of JSON, {"tiles", "seconds"} or {"error"}. So a peer is imported
once, which is not counted, and its repetitions take turns with those of the others.
"""

import json
import os
import sys
import time


def serve(tile_and_decode):
    """Answer until stdin ends; `tile_and_decode(path, num_workers)` returns the number of tiles that it decoded."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the peer prints goes to stderr
    num_workers = int(sys.argv[1])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        try:
            tiles = tile_and_decode(line.rstrip("\n"), num_workers)
            answer = {"tiles": tiles, "seconds": time.perf_counter() - started}
        except Exception as error:  # reported by the benchmark, which goes on with the other peers
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)
