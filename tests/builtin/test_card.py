from rltune.builtin.card import figure_tables
from rltune.builtin.measure import MEASURES


def test_tables_hold_every_figure_in_its_place() -> None:
    figures = {"denoiser": {"val_loss": 0.31234567, "num_samples": 768_000.0}}
    for number, kind in enumerate(("samples", "shuffled", "reconstructions", "renders")):
        shares = {name: 0.1 * number + 0.01 * i for i, name in enumerate(MEASURES)}
        ends = {f"{name}_{end}": shift for name in MEASURES for end, shift in (("low", 0.25), ("high", 0.75))}
        figures[kind] = shares | ends | {"alignment": 0.5 + number, "aesthetic": 5.0 + number}
    lines = figure_tables(figures).splitlines()
    # samples, its interval, reconstructions, renders, shuffled; ``ground`` is the second measure
    assert "| ground | 0.010 | 0.250 to 0.750 | 0.210 | 0.310 | 0.110 |" in lines
    assert "| two groups: all of both | 0.070 | 0.250 to 0.750 | 0.270 | 0.370 | 0.170 |" in lines
    assert "| alignment | 0.500 | | 2.500 | 3.500 | 1.500 |" in lines
    assert "| denoiser | val_loss 0.3123, num_samples 768,000 |" in lines
