package chart

import (
	"testing"
	"time"

	ri "helm.sh/helm/v4/pkg/release"
	"helm.sh/helm/v4/pkg/release/common"
	release "helm.sh/helm/v4/pkg/release/v1"
)

// What an upgrade is given is judged together with what the release keeps.
func TestUpgradeValues(t *testing.T) {
	ch, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	kept := map[string]any{"namespaces": []any{"shop"}, "direct": map[string]any{"addresses": []any{"10.0.0.1:30443"}}}
	for _, set := range []string{"admission.policy=false", "direct.service=ClusterIP"} {
		for reset, ok := range map[bool]bool{false: true, true: false} {
			o := Options{Set: []string{set}, ResetValues: reset}
			vals, err := o.values()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := render(ch, o.over(kept, vals), "doppel"); (err == nil) != ok {
				t.Errorf("%s, reset %v: %v", set, reset, err)
			}
		}
	}
	if len(kept) != 2 || kept["admission"] != nil {
		t.Errorf("the release's own were changed: %v", kept)
	}
}

// TestSetString: what is text to the chart may look like a number.
func TestSetString(t *testing.T) {
	if _, err := Render(Options{Set: []string{"image.tag=20241010"}}); err == nil {
		t.Error("--set makes it a number, which the chart does not take")
	}
	if _, err := Render(Options{SetString: []string{"image.tag=20241010", "manager.nodeSelector.dev=true"}}); err != nil {
		t.Error(err)
	}
}

// Only what this upgrade has made is rolled back, and nothing that somebody else makes meanwhile.
func TestSame(t *testing.T) {
	now := time.Now()
	rel := func(version int, at time.Time) *release.Release {
		return &release.Release{Version: version, Info: &release.Info{LastDeployed: at}}
	}
	for name, row := range map[string]struct {
		last *release.Release
		want bool
	}{
		"ours":                {rel(6, now), true},
		"not written":         {rel(5, now.Add(-time.Hour)), false},
		"theirs, beside ours": {rel(6, now.Add(time.Millisecond)), false},
		"theirs, after ours":  {rel(7, now.Add(time.Second)), false},
		"removed":             {nil, false},
	} {
		if got := same(row.last, rel(6, now)); got != row.want {
			t.Errorf("%s: %v", name, got)
		}
		if got := theirs(row.last, rel(6, now)); got != (row.last != nil && !row.want) {
			t.Errorf("%s: theirs %v", name, got)
		}
	}
	if !theirs(rel(1, now), nil) || theirs(nil, nil) {
		t.Error("where nothing of ours was written, what is there is theirs")
	}
}

// TestLastGood: an upgrade that fails goes back to what worked, not to an earlier failure.
func TestLastGood(t *testing.T) {
	var all []ri.Releaser
	for i, st := range []common.Status{common.StatusSuperseded, common.StatusSuperseded, common.StatusFailed, common.StatusDeployed} {
		all = append(all, &release.Release{Version: i + 1, Info: &release.Info{Status: st}})
	}
	if got := lastGood(all, 4); got != 2 {
		t.Errorf("revision %d", got)
	}
	if got := lastGood(all[2:], 4); got != 0 {
		t.Errorf("revision %d of failures only", got)
	}
}
