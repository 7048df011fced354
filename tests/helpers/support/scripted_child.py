"""A stand-in for the processes of `verify`, without torch: it tells what a script says.

    python scripted_child.py JOB EVENTS

The script is a JSON file that ``VERIFY_SCRIPT`` names. It holds, for each kind of job, or for "class KEY", a list of
turns: the events that the process tells in its first run, in its second, and so on. The last turn is repeated. Instead
of an event, ["sleep", s], ["exit", n], ["kill", n] and ["say", text] do what they say. Where the turns of "times" and
"plans" hold none, each pass that the job asks for gets made-up times.
"""

import json
import os
import sys
import time


def main() -> None:
    job, path = json.loads(sys.argv[1]), sys.argv[2]
    with open(os.environ["VERIFY_SCRIPT"]) as file:
        script = json.load(file)
    kind = job["kind"]
    name = f"class {job['class']['key']}" if kind == "class" else kind
    with open(os.environ["VERIFY_SCRIPT"] + ".jobs", "a") as jobs:
        print(json.dumps([job, os.environ.get("LORA_KERNELS_EVIDENCE"), os.getpid()]), file=jobs)
    with open(os.environ["VERIFY_SCRIPT"] + ".jobs") as jobs:
        before = [json.loads(line)[0] for line in jobs]
    turn = sum(each["kind"] == kind and each.get("class") == job.get("class") for each in before) - 1
    with open(path, "a", buffering=1) as events:
        tell = lambda event: print(json.dumps(event), file=events)  # noqa: E731
        turns = script.get(name) or [usual(job)]
        for event in turns[min(turn, len(turns) - 1)]:
            if event == "the rest":
                list(map(tell, usual(job)))
            elif isinstance(event, dict):
                tell(event)
            elif event[0] == "sleep":
                time.sleep(event[1])
            elif event[0] == "exit":
                sys.exit(event[1])
            elif event[0] == "kill":
                os.kill(os.getpid(), event[1])
            else:
                print(event[1])
        tell({"end": True})


def usual(job: dict) -> list[dict]:
    """Return the events of a job in which all is well."""
    if job["kind"] == "class":
        return [{"verdict": {"key": job["class"]["key"], "result": "right", "why": ""}}]
    if job["kind"] == "times":
        return [timing(*each) for each in job["passes"]]
    if job["kind"] == "chosen":
        return [{"chosen": [label(*each), "composite"]} for each in job["passes"]]
    if job["kind"] == "plans":
        return [{"step": label(*each)} for each in job["passes"]]
    return []


def label(size: list, p: float, op: str) -> str:
    M, K, N, R = size
    return f"{M}x{K}x{N}:{R} p={p:g} {op}"


def timing(size: list, p: float, op: str) -> dict:
    M, K, N, R = size
    bucket = {"op": op, "dtype": "bfloat16", "adapter_dtype": "bfloat16", "M": M, "N": N, "K": K, "R": R}
    bucket |= {"dropout": p > 0, "w_format": "dense"}
    ratios = {"composite": [1.0, 1.1, 1.2], "eager": [1.5, 1.6, 1.7]}
    return {"timing": {"bucket": bucket, "frozen_seconds": 1e-4, "ratios": ratios}, "done": label(size, p, op)}


if __name__ == "__main__":
    main()
