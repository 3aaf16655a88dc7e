def solve_milp(t): raise NotImplementedError
