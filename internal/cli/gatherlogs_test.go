//go:build linux

package cli

import (
	"archive/zip"
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/rootapi"
)

// leaked are secrets in the forms in which logs, configurations and objects have them; "SECRET" is what nobody may read.
var leaked = []string{
	`time=x level=DEBUG msg=request authorization="Bearer SECRETSECRET.abc-def"`,
	`Authorization: Basic SECRETSECRET==`,
	"token: SECRET", `"token":"SECRET SECRET"`, `token='SECRET'`, `client_secret=SECRET&x=1`, "AWS_SECRET_ACCESS_KEY=SECRET", "PGPASSWORD: SECRET",
	`"password": "SECRET\"SECRET"`, `{\"password\":\"SECRET\"}`,
	"client-key-data: SECRET==", "client-certificate-data: SECRET", "apiKey: SECRET", "Set-Cookie: SECRET; path=/",
	"postgres://ada:SECRET@db.shop:5432/x", "proxy-url: http://u:SECRET@proxy:3128",
	"-----BEGIN EC PRIVATE KEY-----\nSECRET\nSECRET\n-----END EC PRIVATE KEY-----", `-----BEGIN PRIVATE KEY-----\nSECRET\n-----END PRIVATE KEY-----`,
	"eyJSECRETSECRET.SECRET.SECRET", "saw eyJSECRETSECRET.SECRET in a header",
}

func TestMask(t *testing.T) {
	for _, s := range leaked {
		if got := string(mask([]byte("before " + s + " after"))); strings.Contains(got, "SECRET") && !strings.Contains(got, "AWS_SECRET_ACCESS_KEY="+masked) ||
			!strings.HasPrefix(got, "before ") || !strings.Contains(got, masked) {
			t.Errorf("%s\nbecame %s", s, got)
		}
	}
	for _, s := range []string{
		`time=2026-01-01T00:00:00Z level=INFO msg="tunnel up" manager=traffic-manager-5d8 version=0.1.0`,
		"http://10.96.0.5:8080/path", "user: system:serviceaccount:shop:robot", "key=sha256:abc", "it answers to nobody",
	} {
		if got := string(mask([]byte(s))); got != s {
			t.Errorf("%s\nbecame %s", s, got)
		}
	}
}

// What is gathered on a machine whose logs hold secrets is searched as whoever gets the file would search it.
func TestGatherLogs(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("HOME", dir)
	for _, env := range []string{"XDG_STATE_HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"} {
		t.Setenv(env, dir)
	}
	t.Setenv("KUBECONFIG", filepath.Join(dir, "none"))
	t.Setenv("DOPPEL_ROOT_SOCKET", filepath.Join(dir, "rootd.sock"))
	logDir := filepath.Join(dir, "doppel")
	if err := os.MkdirAll(logDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(logDir, "daemon.log"), []byte("msg=hello\n"+strings.Join(leaked, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "logs.zip")
	gather := func() (int, string) {
		var out, errOut bytes.Buffer
		code := run(context.Background(), []string{"gather-logs", "-f", file}, Streams{In: strings.NewReader(""), Out: &out, Err: &errOut})
		return code, out.String() + errOut.String()
	}
	code, said := gather()
	if code != 0 || !strings.Contains(said, "not in it: rootd.log") || !strings.Contains(said, "no kubeconfig") {
		t.Fatalf("exit code %d: %s", code, said)
	}
	z, err := zip.OpenReader(file)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	there := map[string]bool{}
	for _, f := range z.File {
		there[f.Name] = true
		r, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(b), "AWS_SECRET_ACCESS_KEY="+masked, "")
		if strings.Contains(text, "SECRET") {
			t.Errorf("%s holds a secret:\n%s", f.Name, text)
		}
		if f.Name == "daemon.log" && !strings.Contains(text, "msg=hello\n") {
			t.Errorf("the log is not there: %s", text)
		}
	}
	for _, name := range []string{"version.txt", "daemon.log", "config.yaml", "doctor.txt", "problems.txt"} {
		if !there[name] {
			t.Errorf("no %s in %v", name, there)
		}
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	if code, said := gather(); code != 2 || !strings.Contains(said, "file exists") {
		t.Errorf("a file that is there was written over: %d, %s", code, said)
	}
}

// The log of a service is in the journal, and a file of a time before is not taken for it.
func TestGatherRootLog(t *testing.T) {
	for name, tt := range map[string]struct {
		service          bool
		journalctl, want string // "": none
	}{
		"by sudo":             {false, "echo journal", "file"},
		"a service":           {true, `echo journal "$@"`, "journal -u doppel-rootd --no-pager"},
		"nothing to be shown": {true, "exit 0", ""},
		"not allowed":         {true, "echo No journal files were opened due to insufficient permissions >&2; exit 1", ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, nil)
			b.connected(t)
			b.write(t, "doppel/rootd.log", "file\n")
			b.write(t, "doppel/run.log", "of run\n")
			b.write(t, "journalctl", "#!/bin/sh\n"+tt.journalctl+"\n")
			if err := os.Chmod(filepath.Join(b.home, "journalctl"), 0o700); err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", b.home)
			b.protocol.Store(rootapi.Protocol)
			b.service.Store(tt.service)
			l, err := net.Listen("unixpacket", filepath.Join(b.home, "rootd.sock"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = l.Close() })
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					go b.rootAnswers(c)
				}
			}()
			file := filepath.Join(b.home, "logs.zip")
			code, out, said := doppel(t, "gather-logs", "-f", file)
			if code != 0 || strings.Contains(out, "rootd.log: it is in the journal: sudo journalctl -u doppel-rootd: ") != (tt.want == "") {
				t.Fatalf("%d %s%s", code, out, said)
			}
			z, err := zip.OpenReader(file)
			if err != nil {
				t.Fatal(err)
			}
			defer z.Close()
			text := func(name string) string {
				f, err := z.Open(name)
				if err != nil {
					return ""
				}
				b, _ := io.ReadAll(f)
				return string(b)
			}
			if got := text("rootd.log"); !strings.HasPrefix(got, tt.want) || tt.want == "" && got != "" {
				t.Errorf("%q", got)
			}
			if got := text("run.log"); got != "of run\n" {
				t.Errorf("run.log: %q", got)
			}
		})
	}
}

// Of a cluster that the kubeconfig here does not have nothing is gathered unheard.
func TestGatherElsewhere(t *testing.T) {
	b := newBench(t, nil)
	b.connected(t, localapi.Session{Context: "prod", Namespace: "shop"})
	none := filepath.Join(b.home, "none")
	t.Setenv("KUBECONFIG", none)
	file := filepath.Join(b.home, "logs.zip")
	if code, out, said := doppel(t, "gather-logs", "-f", file); code != 0 || !strings.Contains(out, "which the kubeconfig here does not have") {
		t.Errorf("%d %s%s", code, out, said)
	}
	if code, out, said := doppel(t, "gather-logs", "-f", file+"2", "--kubeconfig", none); code != 0 || strings.Contains(out, "which the kubeconfig here") {
		t.Errorf("%d %s%s", code, out, said)
	}
}
