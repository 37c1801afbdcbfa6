"""How far a run of this trainer ends from the recorded runs of the classic one.

    python -m benchmarks.ppo.classic_distance

For each case in tests/fixtures/classic_ppo the largest distances over three steps from start to end, as a Markdown
table: intermediates, KL coefficient and weights are absolute, statistics relative where they are larger than 1.
Attention's key bias, whose gradient is zero in mathematics, stands apart from the other weights.
"""

import torch

from harness.classic_ppo import CASES, COLUMNS, reproduce


def main() -> None:
    torch.set_num_threads(1)
    print(f"| case | {' | '.join(column.replace('_', ' ') for column in COLUMNS)} |")
    print(f"| --- {'| --- ' * len(COLUMNS)}|")
    for name in CASES:
        worst = reproduce(name)
        print(f"| {name} | {' | '.join(f'{worst[column]:.1e}' for column in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
