"""Tables of what was measured of serving: the page in a browser, and many clients at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cells import markdown


def played(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per result of benchmarks/browser.py."""
    rows = [
        [
            f"`{name}`",
            f"{result['steps']:.0f}",
            f"{result['first_frame_s']:.1f}",
            f"{result['frames_per_s']:.1f}",
            f"{result['action_to_frame_p50_ms']:.0f}",
            f"{result['action_to_frame_p99_ms']:.0f}",
            f"{result['encoder_ms']:.1f}",
            f"{result['decoder_ms']:.1f}",
        ]
        for name, result in results.items()
    ]
    head = ["in the browser", "steps", "first frame, s", "frames/s", "action to frame, ms, p50"]
    return markdown([*head, "p99", "encoder, ms", "decoder, ms"], rows)


def loads(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per result of benchmarks/load.py."""
    rows = []
    for name, file in results.items():
        result = file["result"]
        rows.append(
            [
                f"`{name}`",
                f"{result['settings']['duration_s'] / 60:.0f}",
                str(result["settings"]["clients"]),
                str(result["counts"]["joined"]),
                str(result["counts"]["frames"]),
                f"{result['num_faults']} / {result['server_faults']:.0f}",
                f"{100 * result['memory_growth']:+.1f} %",
                f"{result['alone_frames_per_s']:.1f}",
                f"{result['fair_frames_per_s']:.1f} ({result['over_alone']:.2f})",
                f"{100 * result['unfairness']:.0f} %",
            ]
        )
    head = ["load", "minutes", "clients", "visits", "frames compared", "faults, clients / server"]
    head += ["memory", "frames/s of one alone", "of all together (over one's)"]
    return markdown([*head, "slowest behind the fastest"], rows)
