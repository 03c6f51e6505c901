package chart

import (
	"os/exec"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/strvals"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// TestSubjectValues puts users' names through a shell and Helm's parser, as the administrator will who pastes the hint.
func TestSubjectValues(t *testing.T) {
	for _, user := range []string{"jane", "jane@example.com", "oidc:jane,doe", `CORP\jane`, "o'hara", "https://issuer.example#jane", "a=b[0].c{d}", "1234", "true", "system:serviceaccount:build:ci"} {
		out, err := exec.Command("sh", "-c", "printf %s "+uerr.ShellQuote(subjectValues(user))).Output()
		if err != nil {
			t.Fatal(err)
		}
		vals := map[string]any{}
		if err := strvals.ParseIntoString(string(out), vals); err != nil {
			t.Errorf("%s: %v (%s)", user, err, out)
			continue
		}
		rbac := vals["clientRbac"].(map[string]any)
		s := rbac["subjects"].([]any)[0].(map[string]any)
		got := s["name"]
		if s["kind"] == "ServiceAccount" {
			got = "system:serviceaccount:" + s["namespace"].(string) + ":" + s["name"].(string)
		}
		if got != user {
			t.Errorf("%s became %v", user, vals)
		}
	}
}

func TestOneLine(t *testing.T) {
	got := oneLine("a\n b: rpc error: code = Unknown desc = rpc error: code = NotFound desc = gone")
	if got != "a b: gone" {
		t.Errorf("%q", got)
	}
}

func TestSchemaReasons(t *testing.T) {
	_, err := Render(Options{Set: []string{"image.tga=1"}})
	if err == nil || strings.Contains(err.Error(), "\n") {
		t.Errorf("not one line: %v", err)
	}
}
