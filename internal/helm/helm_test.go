package helm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// TestMain is doppel-helm when a test runs this program as that.
func TestMain(m *testing.M) {
	if os.Getenv("DOPPEL_HELM_TEST") == "" {
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	os.Exit(Serve(ctx, os.Args[1:], os.Stdout, func(ctx context.Context, r Request, progress func(string)) error {
		progress("namespace " + r.Namespace + " of " + r.Cluster.Context)
		switch r.Set[0] {
		case "refused":
			return uerr.Wrap(errors.New("no"), uerr.Denied, "ask somebody", "may not")
		case "odd":
			return errors.New("odd")
		case "dies":
			os.Exit(3)
		case "silent":
			os.Exit(0)
		case "waits":
			<-ctx.Done()
			progress("taking it back")
			return ctx.Err()
		}
		return nil
	}))
}

func TestRun(t *testing.T) {
	t.Setenv("DOPPEL_HELM_TEST", "1")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for what, tt := range map[string]struct {
		kind uerr.Kind
		err  string
	}{
		"works":   {},
		"refused": {uerr.Denied, "may not: no"},
		"odd":     {uerr.Internal, "odd"},
		"dies":    {uerr.Internal, "doppel-helm: it has ended without an answer"},
		"silent":  {uerr.Internal, "doppel-helm: it has ended without an answer"},
		"waits":   {uerr.Internal, "context canceled"},
	} {
		t.Run(what, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var got []string
			err := Run(ctx, self, Request{Verb: Ensure, Cluster: kube.Options{Context: "lab"}, Options: Options{Namespace: "doppel", Set: []string{what}}}, func(s string) {
				got = append(got, s)
				if what == "waits" {
					cancel()
				}
			})
			want := []string{"namespace doppel of lab"}
			if what == "waits" {
				want = append(want, "taking it back")
			}
			if !slices.Equal(got, want) {
				t.Errorf("progress %q", got)
			}
			switch e := uerr.From(err); {
			case tt.err == "" && err != nil, tt.err != "" && (err == nil || e.Kind != tt.kind || !strings.HasSuffix(e.Msg, tt.err)):
				t.Errorf("%v", err)
			case what == "refused" && e.Hint != "ask somebody":
				t.Errorf("hint %q", e.Hint)
			}
		})
	}
	err = Run(t.Context(), self+"-missing", Request{}, func(string) {})
	if e := uerr.From(err); err == nil || e.Kind != uerr.Usage || !errors.Is(err, os.ErrNotExist) && !errors.Is(err, exec.ErrNotFound) {
		t.Error(err)
	}
}

// Only the doppel of the same release is answered.
func TestServeRefuses(t *testing.T) {
	arg := func(r Request) string {
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for name, args := range map[string][]string{
		"no argument":     nil,
		"another version": {arg(Request{Version: "0.0.0"})},
		"no request":      {"install"},
		"newer":           {`{"version": "` + buildinfo.Version + `", "more": 1}`},
	} {
		var out bytes.Buffer
		code := Serve(t.Context(), args, &out, func(context.Context, Request, func(string)) error {
			t.Errorf("%s: done", name)
			return nil
		})
		if code != 1 || !strings.Contains(out.String(), `"error":`) {
			t.Errorf("%s: %s", name, fmt.Sprint(code, " ", out.String()))
		}
	}
}
