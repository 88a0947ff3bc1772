"""A page with every kind of part, and names that try to break out."""

import math

from soups.reporting.page import Cell, ChartPoint, Curves, Matrix, Page, Scatter, Steps, Table

EVIL = """</script><script>window.broken = 1</script><img src=x onerror="window.broken = 1">"'&<!--"""


def page() -> Page:
    names = [f"{number}a3f9c01" for number in range(6)]
    return Page(
        title="Greedy soup of 6 ingredients",
        subject="soup",
        summary=f"The soup of {EVIL} wins.",
        warnings=["Small split.", EVIL],
        parts=[
            Table(
                title="Accuracy", columns=["model", "test, %", "seconds, s", "note"],
                rows=[
                    ["beta", Cell(value=97.5, low=96.25, high=98.5), 3, None],
                    ["alpha", Cell(value=98.25, low=97.0, high=99.0), 20, EVIL],
                    ["gamma", Cell(value=9.5, low=8.5, high=10.5), 100, "x"],
                    ["delta", math.nan, None, "y"],
                ],
                highlight=[1],
            ),
            Scatter(
                title="ID against OOD", x_label="test accuracy, %", y_label="OOD accuracy, %",
                groups={
                    "left out": [ChartPoint(name=name, x=97 + number / 10, y=88 + number / 5) for number, name in enumerate(names)],
                    EVIL: [ChartPoint(name="soup", x=97.9, y=90.1, details={"held-out": "98.00 %", "why": EVIL})],
                    "probe": [ChartPoint(name="probe", x=60.0, y=42.0)],
                },
            ),
            Steps(
                title="Greedy", score_label="held-out accuracy, %", names=names, scores=[97.0, 97.5, 97.2, 97.6, 97.6, 96.0],
                to_reach=[None, 97.0, 97.5, 97.5, 97.6, 97.6], kept=[True, True, False, True, True, False],
            ),
            Curves(
                title="Barrier", x_label="share", y_label="loss, nats", x=[0, 0.25, 0.5, 0.75, 1],
                series={"a to b": [0.1, 0.15, 0.3, 0.15, 0.1], EVIL: [0.1, None, 0.12, None, math.nan]},
                low={"a to b": [0.05, 0.1, 0.2, 0.1, 0.05]}, high={"a to b": [0.15, 0.2, 0.4, 0.2, 0.15]},
            ),
            Curves(title="Best of N", x_label="N", y_label="reward", x=[1, 4, 16, 64], series={"soup": [0.1, 0.3, 0.5, 0.55]}, log_x=True),
            Matrix(
                title="Agreement", row_labels=names, column_labels=names, value_label="same answer, %",
                values=[[100.0 if i == j else 95 - abs(i - j) for j in range(6)] for i in range(6)],
            ),
            Matrix(
                title="Landscape", row_labels=[f"{i / 10:.1f}" for i in range(21)], value_label="loss",
                column_labels=[f"{i / 10:.1f}" for i in range(21)],
                values=[[(i - 10) ** 2 / 50 + (j - 8) ** 2 / 90 for j in range(21)] for i in range(21)],
            ),
        ],
        configs={
            names[0]: {"optimizer": {"lr": 1e-4, "name": "adamw"}, "seed": 1},
            names[1]: {"optimizer": {"lr": 3e-4, "name": "adamw"}, "seed": 1, EVIL: EVIL},
        },
        lineage={"soup": "ab" * 32, "members": [{"fingerprint": "cd" * 32, "weights": EVIL}], EVIL: [EVIL, {"deep": EVIL}]},
        environment={"torch": "2.14", EVIL: EVIL},
    )  # fmt: skip
