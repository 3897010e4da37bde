"""The report of a run: one HTML page that holds all it shows, made from what lies in the run folder. It asks no server.

facts.py     what is known of the run
history.py   its journal as curves, hours and joules
costs.py     energy and money, measured or estimated
charts.py    curves as SVG that any width stretches
sections.py, scored.py   the parts of the page
page.py      the page
"""
