"""Charts of results, as SVG for light pages and for dark ones."""

from pathlib import Path

from minisgl.bench.record import Json

_PALETTES = {"light": ("#1f2328", "#3d8bd4", "#d0d7de"), "dark": ("#e6edf3", "#58a6ff", "#3d444d")}


def draw_ladder(results: list[Json], path: Path) -> list[Path]:
    """Tokens per second by stage, a panel for each workload; returns the two files.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("charts need matplotlib: pip install matplotlib") from error
    matplotlib.rcParams["svg.hashsalt"] = "mini-sglang"  # the same numbers make the same file
    workloads = list(dict.fromkeys(result["workload"] for result in results))
    files = []
    for name, (ink, bar, grid) in _PALETTES.items():
        figure = Figure(figsize=(7, 0.6 + 1.9 * len(workloads)), layout="constrained")
        for axis, workload in zip(
            figure.subplots(len(workloads), squeeze=False)[:, 0], workloads, strict=True
        ):
            rows = [result for result in results if result["workload"] == workload]
            labels = [f"stage {row['stage']}" for row in rows]
            bars = axis.barh(labels, [row["tokens_per_second"] for row in rows], color=bar, height=0.62)
            axis.bar_label(bars, [f"{row['tokens_per_second']:,.0f}" for row in rows], padding=4, color=ink)
            axis.set_title(f"{workload}, tokens per second", loc="left", color=ink, fontsize=10)
            axis.invert_yaxis()
            axis.margins(x=0.12)
            axis.tick_params(colors=ink, length=0)
            axis.xaxis.set_visible(False)
            for side, spine in axis.spines.items():
                spine.set_visible(side == "left")
                spine.set_color(grid)
        files.append(path.with_name(f"{path.stem}-{name}.svg"))
        figure.savefig(files[-1], transparent=True, metadata={"Date": None})
    return files
