package cli

import "testing"

func TestParseLoss(t *testing.T) {
	for s, want := range map[string]float64{"0": 0, "0.1%": 0.001, "25": 0.25, "100%": 1} {
		if got, err := parseLoss(s); err != nil || got != want {
			t.Errorf("%s: %v %v, want %v", s, got, err, want)
		}
	}
	for _, s := range []string{"", "%", "much"} {
		if got, err := parseLoss(s); err == nil {
			t.Errorf("%q is accepted as %v", s, got)
		}
	}
}

func TestCommandsAreWhole(t *testing.T) {
	root := rootCommand()
	for _, path := range [][]string{
		{"up"},
		{"down"},
		{"build"},
		{"status"},
		{"load"},
		{"kubeconfig"},
		{"node", "exec"},
		{"outside", "exec"},
		{"laptop", "add"},
		{"laptop", "rm"},
		{"laptop", "exec"},
		{"laptop", "link"},
		{"image", "build"},
		{"image", "push"},
	} {
		cmd, rest, err := root.Find(path)
		if err != nil || len(rest) > 0 {
			t.Errorf("%v: %v", path, err)
			continue
		}
		if cmd.Short == "" || cmd.RunE == nil {
			t.Errorf("%v has no description or does nothing", path)
		}
	}
}
