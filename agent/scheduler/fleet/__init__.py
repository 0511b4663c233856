"""The nodes: what they report, whether they are alive, cordons and drains."""
