"""Pages and figures of what runs and sweeps wrote.

source (a run, or a ledger) → factors (what varies) → compare (full blocks, intervals, shares) → group, summary
(sections) → draw, page (page.css, page.js), run_list; build writes it.
"""
