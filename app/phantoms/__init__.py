"""The built-in cohort: anatomy, findings, what may be said of them."""
