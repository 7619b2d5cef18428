"""Every experiment, table and figure of the paper, on one page (``smart reproduce``)."""
