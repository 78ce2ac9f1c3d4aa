"""Cases with known results, in the layout of `evaluate` modules. `result` holds some of the returned values."""

test_cases = [
    # An example that is right again at a larger epsilon, the second here, does not count there.
    {
        "predictions": [[0, 0, 0], [1, 0, 1], [1, 1, 0], [2, 2, 2]],
        "references": [0, 1, 1, 0],
        "epsilons": [0, 0.01, 0.02],
        "result": {
            "expected_robustness": 0.5,
            "clean_accuracy": 0.75,
            "robust_accuracy": 0.25,
            "accuracies": [0.75, 0.5, 0.25],
            "lower_bound": 0.375,
            "upper_bound": 0.625,
        },
    },
    # Never fooled: everything is 1. From a model that withstands a share of sqrt(0.025), two in a row are a surprise.
    {
        "predictions": [[1, 1], [0, 0]],
        "references": [1, 0],
        "epsilons": [0, 0.5],
        "result": {
            "expected_robustness": 1.0,
            "clean_accuracy": 1.0,
            "robust_accuracy": 1.0,
            "accuracies": [1.0, 1.0],
            "lower_bound": 1.0,
            "upper_bound": 1.0,
            "confidence_interval": [0.025**0.5, 1.0],
        },
    },
    # An uneven grid: the intervals count by their widths, 1/4 and 3/4.
    {
        "predictions": [[3, 3, 0]],
        "references": [3],
        "epsilons": [0, 0.25, 1],
        "result": {
            "expected_robustness": 0.625,
            "clean_accuracy": 1.0,
            "robust_accuracy": 0.0,
            "accuracies": [1.0, 1.0, 0.0],
            "lower_bound": 0.25,
            "upper_bound": 1.0,
        },
    },
]
