package kube

import (
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/net/http/httpproxy"
	"k8s.io/client-go/rest"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// proxyVariables say by which proxy the API server is reached, where the kubeconfig does not.
var proxyVariables = []string{"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "REQUEST_METHOD"} // the last one: httpproxy heeds no HTTP_PROXY beside it (CGI)

// Environment is what of this process's environment decides how the cluster is reached: all of it where a program of the kubeconfig gets the
// credentials, else what says the proxy.
func (c *Cluster) Environment() []string {
	if c.config.ExecProvider != nil {
		return os.Environ()
	}
	return proxies(os.Environ())
}

// proxies are the variables of env that say a proxy.
func proxies(env []string) []string {
	return slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		name, value, _ := strings.Cut(v, "=")
		return value == "" || !slices.Contains(proxyVariables, strings.ToUpper(name))
	})
}

// inEnvironment has cfg used as it would be in a process with that environment: a daemon lives longer than the terminal that started it.
func inEnvironment(cfg *rest.Config, env []string) {
	get := func(names ...string) string {
		for _, name := range names {
			for _, v := range slices.Backward(env) {
				if value, ok := strings.CutPrefix(v, name+"="); ok && value != "" {
					return value
				}
			}
		}
		return ""
	}
	if cfg.Proxy == nil && len(proxies(env))+len(proxies(os.Environ())) > 0 {
		proxy := (&httpproxy.Config{
			HTTPProxy: get("HTTP_PROXY", "http_proxy"), HTTPSProxy: get("HTTPS_PROXY", "https_proxy"), NoProxy: get("NO_PROXY", "no_proxy"), CGI: get("REQUEST_METHOD") != "",
		}).ProxyFunc()
		cfg.Proxy = func(r *http.Request) (*url.URL, error) { return proxy(r.URL) }
	}
	if cfg.ExecProvider == nil {
		return
	}
	p := cfg.ExecProvider.DeepCopy()
	p.Env = nil
	for _, v := range env { // the kubeconfig's own come last, and win
		if name, value, ok := strings.Cut(v, "="); ok && name != "" {
			p.Env = append(p.Env, clientcmdapi.ExecEnvVar{Name: name, Value: value})
		}
	}
	p.Env = append(p.Env, cfg.ExecProvider.Env...)
	p.Command = lookIn(get("PATH"), p.Command)
	cfg.ExecProvider = p
}

// lookIn finds a program in a PATH that is not this process's; what is not there stays as it is.
func lookIn(path, program string) string {
	if filepath.Base(program) != program {
		return program
	}
	for _, dir := range filepath.SplitList(path) {
		file := filepath.Join(dir, program)
		if st, err := os.Stat(file); filepath.IsAbs(dir) && err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return file
		}
	}
	return program
}
