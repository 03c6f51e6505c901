package archtest

// module is the path that all of our packages start with.
const module = "github.com/doppel-dev/doppel/"

// platforms are the operating systems whose build is looked at: an import may stand in a file of one of them only.
var platforms = []string{"linux", "darwin", "windows"}

// layer is a row of the picture. A package imports packages of lower layers freely, of its own layer as sideways says, of higher
// ones never.
type layer struct {
	name     string
	packages []string
	only     []string        // if set: the prefixes of all that may be imported from outside the standard library and ours
	never    map[string]bool // prefixes that the layer must not link, not even through others
}

// layers from the bottom to the top. Packages that only tests use (their name ends in "test") stand in none: they may import
// anything, and only tests and their like may import them.
var layers = []layer{
	{
		name:     "leaves",
		packages: []string{"internal/uerr", "internal/xlog", "internal/lifecycle", "internal/buildinfo", "internal/environ", "internal/footprint", "internal/match", "internal/rawio", "internal/roots", "internal/sched"},
		only:     []string{"golang.org/x/"},
		never:    noKubernetes,
	},
	{
		name: "contracts",
		packages: []string{
			"internal/agentcfg", "internal/config", "internal/control", "internal/localapi", "internal/mux", "internal/relayapi", "internal/rootapi",
			"internal/wire",
		},
		only:  []string{"golang.org/x/", "sigs.k8s.io/yaml", "go.yaml.in/yaml/v3"}, // the last one for line numbers
		never: noKubernetes,
	},
	{
		name: "engines",
		packages: []string{
			"internal/flow", "internal/httproute", "internal/mount", "internal/netstack", "internal/netwatch", "internal/osdns", "internal/osroute",
			"internal/redirect", "internal/relay/links", "internal/relay/secret", "internal/relayclient", "internal/resolver", "internal/sandbox", "internal/sftpd", "internal/subnets", "internal/tundev", "internal/tunnel",
		},
		never: noKubernetes,
	},
	{
		name:     "Kubernetes",
		packages: []string{"api/v1alpha1", "charts/doppel", "internal/chart", "internal/helm", "internal/inject", "internal/kinds", "internal/kube"},
	},
	{
		name: "programs",
		packages: []string{
			"internal/agent", "internal/manager", "internal/relay", "internal/relay/access", "internal/relay/acme", "internal/relay/peers", "internal/relay/preview", "internal/relay/store",
			"internal/relay/web", "internal/rootd", "internal/userd",
		},
	},
	{
		name:     "interface",
		packages: []string{"internal/cli", "internal/spawn"},
	},
	{
		name:     "mains",
		packages: []string{"cmd/doppel", "cmd/doppel-helm", "cmd/doppel-relay", "cmd/doppel-rootd", "cmd/traffic-agent", "cmd/traffic-manager", "packaging/pages"},
	},
}

// noKubernetes is what the lower layers never link: they know no Kubernetes, no command line and no process.
var noKubernetes = map[string]bool{
	"k8s.io/": true, "sigs.k8s.io/controller-runtime": true, "helm.sh/": true, "github.com/spf13/": true, "flag": true, "os/signal": true,
}

// sideways are the allowed imports inside a layer.
var sideways = map[string][]string{
	"internal/config":      {"internal/localapi"},
	"internal/localapi":    {"internal/control"}, // what the manager says is passed on as it is
	"internal/mux":         {"internal/wire"},
	"internal/httproute":   {"internal/flow"},
	"internal/netstack":    {"internal/flow", "internal/tundev"},
	"internal/osdns":       {"internal/netwatch"},
	"internal/subnets":     {"internal/osroute"},
	"internal/tunnel":      {"internal/flow"},
	"internal/relayclient": {"internal/tunnel"},
	"internal/sandbox":     {"internal/flow", "internal/osroute", "internal/resolver", "internal/tundev"},
	"internal/kube":        {"api/v1alpha1", "internal/kinds"},

	"internal/relay":         {"internal/relay/acme", "internal/relay/peers", "internal/relay/preview", "internal/relay/store", "internal/relay/web"},
	"internal/relay/access":  {"internal/relay/store"},
	"internal/relay/acme":    {"internal/relay/store"},
	"internal/relay/links":   {"internal/relay/secret", "internal/tunnel"},
	"internal/relay/peers":   {"internal/relay/store"},
	"internal/relay/preview": {"internal/relay/access", "internal/relay/store"},
	"internal/relay/web":     {"internal/relay/access", "internal/relay/preview", "internal/relay/store"},

	"internal/chart": {"charts/doppel", "internal/helm", "internal/kube"},
	"internal/helm":  {"internal/kube"},
	"internal/cli":   {"internal/spawn"},
}

// outside are trees that belong to no layer and import nothing of ours but themselves.
var outside = []string{"examples/", "bench"}

// importers are the only packages that import a library directly (tests aside), so that it can be replaced in one place.
var importers = []struct {
	library  string
	packages []string
	reason   string
}{
	{"gvisor.dev/gvisor", []string{"internal/netstack"}, "the userspace stack has one room; its API changes with each pseudo-version"},
	{"helm.sh/helm", []string{"internal/chart"}, "17 MB and an API that moves"},
	{"github.com/spf13/", []string{"internal/cli", "packaging/pages"}, "nobody else has a command line; pages are made of it"},
	{"github.com/caddyserver/certmagic", []string{"internal/relay/acme"}, "it has defaults of the whole process, and a log of its own"},
	{"github.com/miekg/dns", []string{"internal/resolver", "internal/manager", "internal/relay/acme"}, "version 2 is another module; the manager only passes messages on"},
	{"github.com/google/nftables", []string{"internal/osdns", "internal/redirect"}, "rules are built pure and applied in one place"},
	{"github.com/godbus/dbus", []string{"internal/osdns"}, "systemd-resolved is the only one we talk to over D-Bus"},
	{"github.com/vishvananda/netlink", []string{"internal/osdns", "internal/osroute"}, "the OS edge takes desired state"},
	{"github.com/hanwen/go-fuse", []string{"internal/mount"}, "the file system has one room"},
	{"github.com/pkg/sftp", []string{"internal/mount", "internal/sftpd"}, "its errors are translated at either end, and nowhere else"},
	{"sigs.k8s.io/controller-runtime", []string{"internal/manager"}, "it starts caches and flags of its own"},
	{"github.com/coreos/go-oidc", []string{"internal/relay/web"}, "identity providers are asked in one place"},
	{"github.com/jackc/pgx", []string{"internal/relay/store"}, "as SQLite"},
	{"modernc.org/sqlite", []string{"internal/relay/store"}, "the database is the relay's, and may be another one"},
	{
		"k8s.io/client-go",
		[]string{
			"internal/kube", "internal/chart", "internal/manager", "cmd/traffic-manager",
		},
		"the laptop talks to Kubernetes through kube, with the user's credentials; chart because Helm wants its types",
	},
}

// links are the dependencies that a binary must not have, on no platform, with the reason.
var links = map[string]map[string]string{
	"cmd/doppel": {
		"github.com/google/nftables":                 "rules are set by the privileged programs; the user daemon has no privilege",
		"helm.sh/":                                   "every command would start with it, and the user daemon have it in memory: doppel-helm has it",
		"k8s.io/client-go/kubernetes":                "all groups of Kubernetes, twice the program and its memory: internal/kube asks for what it needs",
		"github.com/caddyserver/certmagic":           "certificates are the relay's",
		"modernc.org/sqlite":                         "the database is the relay's",
		"github.com/jackc/pgx":                       "the database is the relay's",
		"github.com/coreos/go-oidc":                  "identity providers are the relay's",
		"go.etcd.io/bbolt":                           "the database is the relay's",
		module + "internal/rootd":                    "a user daemon that can be root daemon is a way to root",
		module + "internal/manager":                  "the manager runs in the cluster",
		module + "internal/agent":                    "the agent runs in the cluster",
		"k8s.io/kubernetes":                          "Kubernetes itself is the lab's, which is a module of its own",
		"sigs.k8s.io/controller-runtime/pkg/manager": "the laptop runs no controllers",
	},
	"cmd/doppel-helm": {
		module + "internal/userd":   "it installs, and is gone",
		"gvisor.dev/":               "as userd",
		"github.com/hanwen/go-fuse": "as userd",
		"k8s.io/kubernetes":         "Kubernetes itself is the lab's, which is a module of its own",
	},
	"cmd/doppel-rootd": {
		"k8s.io/":               "the root daemon knows no Kubernetes: its code is what runs as root on a laptop, so it is small (D4)",
		"sigs.k8s.io/":          "as k8s.io",
		"helm.sh/":              "as k8s.io",
		"github.com/spf13/":     "its command line is a handful of flags",
		"gvisor.dev/":           "packets are parsed without privilege (D4)",
		"github.com/miekg/dns":  "DNS is parsed without privilege (D4)",
		"net/http":              "HTTP is parsed without privilege (D4)",
		"crypto/tls":            "the tunnel ends in the user daemon",
		"os/exec":               "it starts no programs: what it does to the machine it does by system calls",
		module + "internal/mux": "frames of the tunnel are parsed without privilege (D4)",
	},
	"cmd/traffic-agent": {
		"k8s.io/client-go":               "the agent runs in every intercepted pod: at most 15 MB, and no rights in the cluster (D8)",
		"k8s.io/apimachinery":            "as client-go",
		"k8s.io/api/":                    "as client-go",
		"sigs.k8s.io/controller-runtime": "as client-go",
		"helm.sh/":                       "charts are installed by the laptop",
		"gvisor.dev/":                    "the stack is the laptop's",
		"github.com/hanwen/go-fuse":      "mounting is the laptop's",
		"github.com/spf13/":              "it is configured by its environment",
	},
	"cmd/traffic-manager": {
		"helm.sh/":               "charts are installed by the laptop",
		"gvisor.dev/":            "the stack is the laptop's",
		"github.com/spf13/cobra": "its command line is a handful of flags",
	},
	"cmd/doppel-relay": {
		"k8s.io/":                "the relay stands anywhere and knows no cluster (D11)",
		"sigs.k8s.io/":           "as k8s.io",
		"helm.sh/":               "as k8s.io",
		"gvisor.dev/":            "the stack is the laptop's",
		"github.com/spf13/cobra": "its command line is a handful of flags",
	},
}

// linkedBy are the only packages that may bring such a dependency into a binary after all, with the reason.
var linkedBy = map[string]map[string]map[string]string{
	"cmd/doppel-rootd": {
		"os/exec": {"github.com/godbus/dbus/v5": "it would start a session's bus, which nobody asks it for: osdns hands it a socket of the system's"},
	},
}

// maxMain is how many lines of code (no blanks, no comments) a main package may have: what is longer belongs into a program.
const maxMain = 60

// goos are the files outside of mains that may ask runtime.GOOS; all others have files per platform or take a goos parameter.
var goos = map[string]string{
	"internal/buildinfo/buildinfo.go": "prints the platform",
}
