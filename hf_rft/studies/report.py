from pathlib import Path


def write_report(output_dir: Path, compare=None, baseline=None) -> str:
    return ""
