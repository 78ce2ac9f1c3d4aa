"""Cases with known results, in the layout of `evaluate` modules. `result` holds some of the returned values."""

test_cases = [
    {"predictions": [0, 1, 2, 0], "references": [0, 1, 2, 2], "result": {"robust_accuracy": 0.75}},
    # The last example is right under attack but wrong without it: it does not count. Of the three that are right
    # without an attack, the first is fooled.
    {
        "predictions": [1, 1, 2, 2],
        "references": [0, 1, 2, 2],
        "clean_predictions": [0, 1, 2, 0],
        "result": {"robust_accuracy": 0.5, "clean_accuracy": 0.75, "attack_success_rate": 1 / 3},
    },
    # Nothing is right without an attack, so nothing can be fooled.
    {
        "predictions": [1, 1],
        "references": [0, 1],
        "clean_predictions": [1, 0],
        "result": {"robust_accuracy": 0.0, "clean_accuracy": 0.0, "attack_success_rate": 0.0},
    },
]
