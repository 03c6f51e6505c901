package buildinfo

import (
	"runtime"
	"strings"
	"testing"
)

func TestString(t *testing.T) {
	if got := String(); !strings.HasPrefix(got, Version+" (go") || !strings.HasSuffix(got, ", "+runtime.GOOS+"/"+runtime.GOARCH+")") {
		t.Error(got)
	}
}
