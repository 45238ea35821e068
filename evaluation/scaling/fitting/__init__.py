"""Value against compute: the forms a law may have, their solvers, certificates and checks."""
