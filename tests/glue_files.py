"""Made-up rows of GLUE's tasks, for the tests of the scripts that fine-tune on them."""

import random

from glue_tasks import TASKS


def write_glue(folder, task, rows=40):
    """Made-up rows of `task` in the standard layout, which can be learned from their first word."""
    task = TASKS[task]
    folder = folder / task.folder
    folder.mkdir(parents=True)
    generator = random.Random(0)
    names = list(task.header) if task.header else ["index", *(task.in_tsv.get(c, c) for c in (*task.columns, "label"))]
    for file, count in (("train.tsv", rows), *((file, 12) for file in task.validation_files.values())):
        lines = [] if task.header else ["\t".join(names)]
        for number in range(count):
            good = number % 2
            words = [("fox", "dog")[good], *generator.choices(["river", "null", '"old', "film", "night"], k=4)]
            row = dict.fromkeys(names, "x")
            row |= {task.in_tsv.get(c, c): " ".join(words) for c in task.columns}
            # GLUE's files hold names of classes for the entailment tasks and numbers for the others.
            named = task.name in ("qnli", "rte", "mnli")
            label = f"{5.0 * good:.3f}" if task.is_regression else task.labels[good] if named else str(good)
            row[task.in_tsv.get("label", "label")] = label
            lines.append("\t".join(row[name] for name in names))
        mark = "\ufeff" if task.name == "mrpc" else ""
        (folder / file).write_text(mark + "\n".join(lines) + "\n", encoding="utf-8")
    return folder.parent
