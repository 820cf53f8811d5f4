"""Who may do what on a broker that organisations share: rights, certificates, users, bundles.

Nothing here runs in a federation: an operator provisions it once, and the broker holds everybody to it from then on.
"""
