package cli

import (
	"archive/zip"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/spawn"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// gatherTimeout bounds all that is asked of the cluster.
const gatherTimeout = time.Minute

// maxGathered bounds what is taken of each file of this machine in bytes: its end.
const maxGathered = 8 << 20

// journalTimeout bounds the search of the journal.
const journalTimeout = 10 * time.Second

func (a *app) gatherLogsCmd() *cobra.Command {
	var k kubeFlags
	var file string
	c := &cobra.Command{
		Use:   "gather-logs",
		Short: "Put logs and state of all parts into a zip file for a bug report; secrets are masked",
		Long: `Gather-logs writes a zip file with the logs of the two daemons (the root daemon's from the journal if it is a service) and of doppel run, of the traffic-manager and of the agents in the connected namespace,
with status, doctor, configuration and what the user daemon is doing, and with the sessions and intercepts that you may see. Tokens, keys, passwords and the like are
masked; names, addresses and user names are not: look into it before you give it away. What could not be had stands in problems.txt.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.gatherRun(c.Context(), &k, file, c.Flags().Changed)
		},
	}
	k.add(c.Flags(), true)
	a.configured(&k)
	c.Flags().Lookup("namespace").Usage = "namespace of the agents (default: the connected one, or the context's)"
	c.Flags().StringVarP(&file, "output-file", "f", "", "the zip file (default: doppel-logs-TIME.zip in the working directory)")
	return c
}

// follow has flags that were not typed mean what this machine is connected to, or says why it cannot.
func (a *app) follow(ctx context.Context, k *kubeFlags, typed func(flag string) bool) error {
	var st localapi.Status
	if a.client.Call(ctx, localapi.MethodStatus, localapi.StatusRequest{}, &st, nil) != nil {
		return nil // which is told of status.yaml
	}
	for _, s := range sessions(st) {
		o := k.Options
		if !typed("context") && !typed("kubeconfig") {
			o.Context = s.Context
		}
		cluster, err := kube.Load(o)
		if err != nil || cluster.Context != s.Context || cluster.Server != s.Server {
			continue
		}
		k.Options = o
		if !typed("namespace") {
			k.Namespace = s.Namespace
		}
		if !typed("manager-namespace") {
			k.managerNS = s.ManagerNamespace
		}
		return nil
	}
	if st.Session == nil || typed("context") || typed("kubeconfig") {
		return nil
	}
	return fmt.Errorf("this machine is connected to context %s at %s, which the kubeconfig here does not have: what is here of a cluster is another one's; --kubeconfig says where it is", st.Session.Context, st.Session.Server)
}

// gathering is what goes into the zip file, masked.
type gathering struct {
	files    map[string][]byte
	names    []string // in their order
	problems []string
}

func (g *gathering) add(name string, text []byte) {
	g.names = append(g.names, name)
	g.files[name] = mask(text)
}

func (g *gathering) problem(name string, err error) {
	g.problems = append(g.problems, fmt.Sprintf("%s: %s", name, oneLine(err.Error())))
}

// object adds v as YAML, or the reason why there is none.
func (g *gathering) object(name string, v any, err error) {
	var b []byte
	if err == nil {
		b, err = yaml.Marshal(v)
	}
	if err != nil {
		g.problem(name, err)
		return
	}
	g.add(name, b)
}

// gatherOutput is the JSON form of gather-logs.
type gatherOutput struct {
	File     string   `json:"file"`
	Files    []string `json:"files"`
	Problems []string `json:"problems"`
}

func (a *app) gatherRun(ctx context.Context, k *kubeFlags, file string, typed func(flag string) bool) error {
	if file == "" {
		file = "doppel-logs-" + time.Now().Format("20060102-150405") + ".zip"
	}
	show, done := a.progress()
	defer done()
	g := &gathering{files: map[string][]byte{}, problems: []string{}}
	show("Reading this machine's logs")
	a.gatherLocal(ctx, g)
	if err := a.follow(ctx, k, typed); err != nil {
		g.problem("the cluster", err)
	}
	show("Asking the cluster")
	cctx, cancel := context.WithTimeout(ctx, gatherTimeout)
	defer cancel()
	a.gatherCluster(cctx, g, k)
	show("Looking for what is wrong")
	c := &checkup{show: func(string) {}}
	a.diagnose(cctx, c, k)
	var text bytes.Buffer
	writeChecks(&text, c.list)
	g.add("doctor.txt", text.Bytes())
	if ctx.Err() != nil {
		return ctx.Err()
	}
	g.add("problems.txt", []byte(strings.Join(g.problems, "\n")+"\n"))
	if err := g.write(file); err != nil {
		return uerr.Wrap(err, uerr.Usage, "choose another place with --output-file", "write %s", file)
	}
	done()
	out := gatherOutput{File: file, Files: g.names, Problems: g.problems}
	return a.print(out, func(w io.Writer) {
		fmt.Fprintf(w, "%s: %d files\n", file, len(g.names))
		for _, p := range g.problems {
			fmt.Fprintf(w, "   not in it: %s\n", p)
		}
	})
}

func (a *app) gatherLocal(ctx context.Context, g *gathering) {
	g.add("version.txt", []byte(buildinfo.String()+"\n"))
	for _, name := range []string{"daemon", "rootd", "run"} {
		b, err := localLog(ctx, name)
		switch {
		case err == nil:
			g.add(name+".log", b)
		case name != "run" || !errors.Is(err, fs.ErrNotExist): // not everybody uses doppel run
			g.problem(name+".log", err)
		}
	}
	var st localapi.Status
	err := a.client.Call(ctx, localapi.MethodStatus, localapi.Empty{}, &st, nil)
	g.object("status.yaml", st, err)
	var stacks localapi.Stacks
	if err := a.client.Call(ctx, localapi.MethodStacks, localapi.StacksRequest{}, &stacks, nil); err != nil {
		g.problem("stacks.txt", err)
	} else {
		g.add("stacks.txt", []byte(stacks.Text))
	}
	g.object("config.yaml", inForce(a.config), a.configErr)
}

// localLog is the end of the log of one of this machine's programs.
func localLog(ctx context.Context, name string) ([]byte, error) {
	if name == "rootd" && spawn.RootIsService(ctx) { // the file, if there is one, is of a time before
		return journal(ctx)
	}
	file, err := spawn.LogFile(name)
	if err != nil {
		return nil, err
	}
	return tail(file, maxGathered)
}

// journal is the log of the root daemon's service.
func journal(ctx context.Context) ([]byte, error) {
	args := []string{"-u", spawn.RootProgram, "--no-pager", "--quiet", "--output=cat", "--lines=20000"}
	ctx, cancel := context.WithTimeout(ctx, journalTimeout)
	defer cancel()
	b, err := exec.CommandContext(ctx, "journalctl", args...).Output()
	if e := new(exec.ExitError); errors.As(err, &e) {
		err = fmt.Errorf("%w: %s", err, e.Stderr)
	}
	if err == nil && len(b) == 0 {
		err = errors.New("the journal shows you nothing of it")
	}
	if err != nil {
		return nil, fmt.Errorf("it is in the journal: sudo journalctl -u %s: %w", spawn.RootProgram, err)
	}
	return b[max(0, len(b)-maxGathered):], nil
}

// tail is the end of a file.
func tail(file string, limit int64) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() > limit {
		if _, err := f.Seek(-limit, io.SeekEnd); err != nil {
			return nil, err
		}
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

func (a *app) gatherCluster(ctx context.Context, g *gathering, k *kubeFlags) {
	cluster, err := kube.Load(k.Options)
	if err != nil {
		g.problem("the cluster", err)
		return
	}
	if _, err := cluster.WhoAmI(ctx); err != nil {
		g.problem("the cluster", err)
		return
	}
	logs := func(dir string, list []kube.PodLog, err error) {
		if err != nil {
			g.problem(dir, err)
		}
		for _, l := range list {
			name := dir + "/" + l.Pod + "." + l.Container
			if l.Previous {
				name += ".previous"
			}
			if l.Err != nil {
				g.problem(name+".log", l.Err)
				continue
			}
			g.add(name+".log", l.Text)
		}
	}
	list, err := cluster.ManagerLogs(ctx, k.managerNS)
	logs("manager", list, err)
	list, err = cluster.AgentLogs(ctx, cluster.Namespace)
	logs("agents", list, err)
	intercepts, err := cluster.Intercepts(ctx, cluster.Namespace)
	g.object("intercepts.yaml", intercepts, err)
	sessions, err := cluster.Sessions(ctx, k.managerNS)
	g.object("sessions.yaml", sessions, err)
}

// write makes the zip file, for its owner only.
func (g *gathering) write(file string) (err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			_ = os.Remove(file)
		}
	}()
	z := zip.NewWriter(f)
	for _, name := range g.names {
		w, err := z.CreateHeader(&zip.FileHeader{Name: filepath.ToSlash(name), Method: zip.Deflate, Modified: time.Now()})
		if err != nil {
			return err
		}
		if _, err := w.Write(g.files[name]); err != nil {
			return err
		}
	}
	return z.Close()
}

// masked stands in the place of a secret.
const masked = "*****"

// secrets find what must not leave this machine. The first group stays, what follows it is masked.
var secrets = sync.OnceValue(func() []*regexp.Regexp {
	return []*regexp.Regexp{
		// Whole blocks of PEM that hold a private key, also where a log has them on one line.
		regexp.MustCompile(`(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?-----END [A-Z ]*PRIVATE KEY-----`),
		// Authorization headers, JSON Web Tokens.
		regexp.MustCompile(`(?i)((?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}`),
		regexp.MustCompile(`()\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?`),
		// Passwords in addresses.
		regexp.MustCompile(`([a-z][a-z0-9+.-]*://[^\s:/@"']*:)[^\s/@"']+@`),
		// Keys that say what they are: password: x, "token":"x", client_secret=x, client-key-data: x, AWS_SECRET_ACCESS_KEY=x.
		regexp.MustCompile(`(?i)([a-z0-9_.-]*(?:password|passwd|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|client-key-data|client-certificate-data|credential|cookie)[a-z0-9_.-]*\\?["']?\s*[:=]\s*)(?:\\?"(?:[^"\\]|\\.)*"|'[^']*'|[^\s,;&}\]]+)`),
	}
})

// mask takes the secrets out of a text.
func mask(text []byte) []byte {
	for i, re := range secrets() {
		with := "${1}" + masked
		if i == 3 { // the at sign goes with the password
			with += "@"
		}
		text = re.ReplaceAll(text, []byte(with))
	}
	return text
}
