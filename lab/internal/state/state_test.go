package state

import (
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/lab/internal/plan"
)

// Who gets no subnet is told what to do.
func TestNoSubnetLeft(t *testing.T) {
	_, err := FreeIndex(func(plan.Lab) bool { return true })
	if err == nil || !strings.Contains(err.Error(), "lab down --name NAME") {
		t.Errorf("%v", err)
	}
}
