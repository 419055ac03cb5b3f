"""Published figures beside what is measured or computed here, and what can be said of the two."""
