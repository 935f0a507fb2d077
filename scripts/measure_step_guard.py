"""The table of docs/LOG.md on the step guard: the toy of tests/methods/test_step_guard.py at several rates.

PYTHONPATH=tests:tests/methods python scripts/measure_step_guard.py
"""

from test_step_guard import end

RATES = (0.003, 0.01, 0.03, 0.06, 0.1)

if __name__ == "__main__":
    print(f"| {' | '.join(['', *(f'{rate:g}' for rate in RATES)])} |")
    print("| fedit | " + " | ".join(f"{end('fedit', rate):.2f}" for rate in RATES) + " |")
    for name in ("fedsrd", "fedsrd-e", "florist", "loom"):
        for guard in (False, True):
            cells = [f"{end(name, rate, step_guard=guard):.2f}" for rate in RATES]
            print(f"| {name}{'' if guard else ', no guard'} | {' | '.join(cells)} |", flush=True)
