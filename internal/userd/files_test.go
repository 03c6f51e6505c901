package userd

import (
	"maps"
	"testing"

	"github.com/doppel-dev/doppel/internal/control"
)

// What an administrator hides does not come back from the container itself, and an older manager hides nothing by name.
func TestVariables(t *testing.T) {
	told := map[string]string{"A": "of the pod"}
	for name, tt := range map[string]struct {
		env         control.Environment
		image, want map[string]string
	}{
		"nothing":        {want: map[string]string{}},
		"no image":       {env: control.Environment{Variables: told}, want: told},
		"both":           {control.Environment{Variables: told}, map[string]string{"A": "of the image", "B": "1"}, map[string]string{"A": "of the pod", "B": "1"}},
		"hidden":         {control.Environment{Variables: told, Hidden: []string{"B", "C"}}, map[string]string{"A": "of the pod", "B": "1"}, told},
		"hidden by both": {control.Environment{Variables: told, Hidden: []string{"A"}}, map[string]string{"A": "of the pod"}, map[string]string{}},
	} {
		if got := variables(tt.env, tt.image); got == nil || !maps.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
	if len(told) != 1 {
		t.Errorf("changed what was told: %v", told)
	}
}
