"""Results of ``examples/quality.py`` as tables."""

from __future__ import annotations

from typing import Any

import weight_error


def print_tables(results: dict[str, Any]) -> None:
    settings, validation = results["settings"], results["text"]["validation"]
    print(
        f"\nperplexity of a byte; {results['windows']} windows of {settings['context']} bytes from "
        f"{validation['documents']} documents that were not trained on"
    )
    print(
        f"{'experts':<16}{'runs':<14}{'KiB':>8}{'perplexity':>12}{'to bfloat16':>14}{'± s.e.':>10}"
    )
    for row in results["models"]:
        name = row["weights"] if row["weights"] == "bfloat16" else f"MXFP4, {row['weights']}"
        runs = "compiled" if row["compiled"] else "uncompiled"
        line = f"{name:<16}{runs:<14}{row['expert_bytes'] / 1024:>8.0f}{row['perplexity']:>12.4f}"
        print(line + ("" if name == "bfloat16" else _apart(row["to_bfloat16"])))
    print(f"{'search less max, compiled':<50}{_apart(results['search_to_max'])}")
    for rule, apart in results["compiled_to_uncompiled"].items():
        print(f"{f'compiled less uncompiled, {rule}':<50}{_apart(apart)}")

    print("\nlargest difference of a logit, compiled against uncompiled")
    print(f"{'rule':<16}{'difference':>12}{'bound':>12}{'bytes compared':>18}")
    for rule, logits in results["logits"].items():
        print(
            f"{rule:<16}{logits['difference']:>12.4f}{logits['bound']:>12.4f}"
            f"{logits['bytes_compared']:>18}"
        )
    print()
    weight_error.print_table(results["weights"])


def _apart(difference: dict[str, float]) -> str:
    return f"{difference['perplexity']:>+14.4f}{difference['standard_error']:>10.4f}"
