"""What the benchmarks share: the two clusters, the facts about the machine, the report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import raftkv
from raftkv.local import AsyncLocalCluster
from raftkv.local.load import percentile

ETCD_NODE = Path(__file__).with_name("etcd_node.py")


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--nodes", type=int, default=5, help="nodes of each cluster")
    parser.add_argument("--no-etcd", action="store_true", help="do not run etcd beside it, even if it is there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--node-argument", action="append", default=[], help="one more argument for every raftkv node")
    return parser


def cluster_of(kind: str, options: argparse.Namespace) -> AsyncLocalCluster:
    """A cluster of raftkv or etcd nodes, on free ports, in a temporary directory."""
    if kind == "etcd":
        return AsyncLocalCluster(options.nodes, command=(sys.executable, str(ETCD_NODE)))
    return AsyncLocalCluster(options.nodes, arguments=options.node_argument)


def kinds(options: argparse.Namespace) -> list[str]:
    """What is measured: raftkv, and etcd where there is one."""
    return ["raftkv", *(["etcd"] if not options.no_etcd and shutil.which("etcd") else [])]


def machine() -> dict[str, Any]:
    """Where and with what this ran."""
    facts: dict[str, Any] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "raftkv": raftkv.__version__,
        "grpcio": metadata.version("grpcio"),
        "load_average": round(os.getloadavg()[0], 2),
    }
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts["cpu"] = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        memory = Path("/proc/meminfo").read_text().split()
        facts["memory_gb"] = round(int(memory[memory.index("MemTotal:") + 1]) / 1e6)
    except (OSError, StopIteration, ValueError):
        pass
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    facts["commit"] = described.stdout.strip() or None
    if shutil.which("etcd"):
        shown = subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=False).stdout
        facts["etcd"] = shown.splitlines()[0].rpartition(" ")[2] if shown else None
    return facts


def spread(values: Sequence[float]) -> dict[str, float]:
    """Percentiles of a list."""
    ordered = list(values)
    shown = {name: round(percentile(ordered, share), 2) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {"count": len(ordered), **shown, "max": round(max(ordered, default=0.0), 2)}


def cpu_s(pid: int) -> float:
    """What a process has used so far, its threads and the kernel on its behalf included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Report:
    """Collects what a benchmark found; prints it and writes it as JSON."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self._json: Path | None = options.json
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        self.content: dict[str, Any] = {"benchmark": name, "settings": settings, "machine": machine()}
        self.started = time.monotonic()
        facts = self.content["machine"]
        print(f"{name}: raftkv {facts['raftkv']} ({facts['commit']}), etcd {facts.get('etcd', 'not found')}")
        print(f"machine: {facts['cores']} cores, {facts.get('cpu')}, {facts.get('memory_gb')} GB, {facts['system']}")
        print(f"python {facts['python']}, grpcio {facts['grpcio']}, load average {facts['load_average']}")
        print("settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()), flush=True)

    def add(self, key: str, value: Any) -> None:
        """Keep a figure."""
        self.content[key] = value

    def line(self, text: str) -> None:
        """Say something now."""
        print(text, flush=True)

    def goal(self, text: str, reached: bool) -> None:
        """State a goal and whether it was reached."""
        self.content.setdefault("goals", []).append({"goal": text, "reached": reached})
        print(f"goal {'reached' if reached else 'MISSED'}: {text}", flush=True)

    def finish(self) -> int:
        """Write the JSON. Returns the exit code: 1 when an acknowledged write was lost, whatever the speed."""
        self.content["took_s"] = round(time.monotonic() - self.started, 1)
        lost = find(self.content, "lost")
        if self._json is not None:
            self._json.parent.mkdir(parents=True, exist_ok=True)
            self._json.write_text(json.dumps(self.content, indent=2, default=str) + "\n")
            print(f"written to {self._json}")
        print(f"took {self.content['took_s']} s; acknowledged writes lost: {sum(lost)}")
        return 1 if sum(lost) else 0


def find(content: object, key: str) -> list[int]:
    """All values of this key, however deep."""
    if isinstance(content, Mapping):
        own = [content[key]] if isinstance(content.get(key), int) else []
        return own + [found for value in content.values() for found in find(value, key)]
    if isinstance(content, list):
        return [found for value in content for found in find(value, key)]
    return []
