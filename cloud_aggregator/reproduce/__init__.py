"""The paper's comparisons (arXiv 2404.13238v2), run again and judged by their own figures.

``fig4`` plans the runs, ``runner`` does them, ``gather`` reads their records, ``claims`` holds the
paper's claims against the figures, and ``figure`` and ``tables`` show both.
"""
