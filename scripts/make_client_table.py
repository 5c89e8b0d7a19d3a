"""A server as `cmjax bench serve` and aiperf see it, in turn, beside what it says itself: a table for docs/load.md.

aiperf needs an environment of its own (`pip install aiperf`, 0.9 GB).

    python scripts/make_client_table.py http://127.0.0.1:8000 --aiperf PATH --rounds 3
"""

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from statistics import median

from prometheus_client.parser import text_string_to_metric_families

INPUT_LEN, OUTPUT_LEN = 64, 64
# Column -> the field of `cmjax bench serve`, of aiperf, and the server's own histogram; all in milliseconds in the end.
COLUMNS = {
    "TTFT": ("mean_ttft_ms", "time_to_first_token", "time_to_first_token_seconds"),
    "TPOT": ("mean_tpot_ms", "inter_token_latency", "request_time_per_output_token_seconds"),
    "ICL": ("mean_icl_ms", "inter_chunk_latency", "inter_chunk_latency_seconds"),
    "E2E": ("mean_e2el_ms", "request_latency", "e2e_request_latency_seconds"),
}


def histograms(url: str) -> dict[str, float]:
    """Sums and counts of the server's histograms, by name without the prefix."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    samples = (one for family in text_string_to_metric_families(text) for one in family.samples)
    return {one.name.rpartition(":")[2]: one.value for one in samples if one.name.endswith(("_sum", "_count"))}


def with_servers_own(url: str, measure: Callable[[], dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """What a client measures, and the server's means of the same requests, in milliseconds."""
    before = histograms(url)
    found = measure()
    after = histograms(url)
    own = {}
    for column, (_, _, name) in COLUMNS.items():
        count = after.get(f"{name}_count", 0) - before.get(f"{name}_count", 0)
        if count:
            own[column] = (after[f"{name}_sum"] - before[f"{name}_sum"]) / count * 1e3
    return found, own


def bench_serve(url: str, model: str, sampling: dict[str, float], concurrency: int, count: int) -> dict[str, float]:
    """By `cmjax bench serve`."""
    command = [sys.executable, "-m", "cmjax", "bench", "serve", "--url", url, "--model", model, "--json"]
    command += ["--num-prompts", str(count), "--max-concurrency", str(concurrency), "--idle-s", "0"]
    command += ["--input-len", str(INPUT_LEN), "--output-len", str(OUTPUT_LEN)]
    command += [word for name, value in sampling.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)["results"]["url"]
    assert found["completed"] == count, found["errors"]
    return {column: found[name] for column, (name, _, _) in COLUMNS.items()}


def aiperf(
    program: str, url: str, model: str, sampling: dict[str, float], concurrency: int, count: int
) -> dict[str, float]:
    """By aiperf."""
    with tempfile.TemporaryDirectory() as folder:
        name = Path(model).name
        command = [program, "profile", "--model", name, "--url", url, "--endpoint-type", "completions", "--streaming"]
        command += ["--tokenizer", model, "--use-server-token-count", "--extra-inputs", "ignore_eos:true"]
        command += [word for field, value in sampling.items() for word in ("--extra-inputs", f"{field}:{value}")]
        command += ["--concurrency", str(concurrency), "--request-count", str(count), "--random-seed", "1"]
        command += ["--isl", str(INPUT_LEN), "--osl", str(OUTPUT_LEN), "--ui", "none", "--artifact-dir", folder]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=folder)
        found = json.loads((Path(folder) / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    assert found["request_count"]["avg"] == count, found["error_summary"]
    return {column: found[name]["avg"] for column, (_, name, _) in COLUMNS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--aiperf", default="aiperf", help="its command")
    parser.add_argument("--model", default="models/demo", help="folder of the model's tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=64, help="requests of a run")
    given = parser.parse_args()
    model = str(Path(given.model).resolve())
    print("| concurrency | temperature | client | " + " | ".join(f"{c}, ms (server's)" for c in COLUMNS) + " |")
    print("|--:|--:|---|" + "--:|" * len(COLUMNS))
    for concurrency in (1, 8):
        for temperature, sampling in (("not sent", {}), ("0", {"temperature": 0.0})):
            clients = {
                "cmjax bench serve": lambda s=sampling, c=concurrency: bench_serve(given.url, model, s, c, given.count),
                "aiperf": lambda s=sampling, c=concurrency: aiperf(given.aiperf, given.url, model, s, c, given.count),
            }
            runs = {client: [] for client in clients}
            for _ in range(given.rounds):
                for client, measure in clients.items():
                    runs[client].append(with_servers_own(given.url, measure))
            for client, pairs in runs.items():
                cells = " | ".join(cell(pairs, column) for column in COLUMNS)
                print(f"| {concurrency} | {temperature} | {client} | {cells} |", flush=True)


def cell(pairs: list[tuple[dict[str, float], dict[str, float]]], column: str) -> str:
    """The medians over the rounds: the client's, and the server's own where it has one."""
    own = [server[column] for _, server in pairs if column in server]
    return f"{median(client[column] for client, _ in pairs):.1f} ({f'{median(own):.1f}' if own else '-'})"


if __name__ == "__main__":
    main()
