# What a webhook that was taken over, and a stage of the user's, can reach: every attempt is made for
# real, from inside the units as they are.
{
  # it writes to every terminal that it can reach, the test driver's connection among them
  onlyHosts = true;
  nodes.machine = {
    services.ekiben = {
      enable = true;
      webhook = {
        enable = true;
        projects.app = (import ./deployment.nix).project;
      };
      instances.app = (import ./deployment.nix).instance;
    };
    users.users.stranger = {
      isNormalUser = true;
      uid = 1001;
      group = "users";
    };
  };
}
